"""Masters and moments in host memory: Megatron-Core's hybrid optimizer, made fit for many of them.

`HybridDeviceOptimizer` gives each tensor in host memory an optimizer of its own, so that gradients
come down and weights go up beside the updates of others. Left alone it pins each gradient by
itself, which torch rounds up to a power of two; sends masters in fp32 from pageable memory, so that
the host waits for each; and keeps fp32 copies of the bf16 gradients of what stays on the GPU.
Launchers that start a process a GPU allow each of them one thread.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

BLOCK_BYTES = 2**30
"""Of pinned memory, which torch allocates in powers of two."""
ALIGNMENT = 64


def refine(optimizer: Any) -> None:
    """Changes how states in host memory are updated, no number; other optimizers stay as they are.

    Args:
        optimizer: Megatron-Core's chained one.
    """
    hybrids = [
        part.optimizer
        for part in optimizer.chained_optimizers
        if isinstance(part.optimizer, HybridDeviceOptimizer)
    ]
    for hybrid in hybrids:
        _refine(hybrid)
    if hybrids:
        # Megatron-Core builds each twice, for whole weights and for this rank's share; the first is
        # part of a cycle, and holds a master of each weight.
        gc.collect()


def _refine(hybrid: HybridDeviceOptimizer) -> None:
    bring_gradients, update = hybrid._set_sub_optimizer_grads, hybrid.step

    def bring() -> None:
        # A loaded checkpoint makes masters and their optimizers anew.
        if not hybrid.cpu_copy_map_grad:
            _prepare(hybrid)
        bring_gradients()

    def step(closure: Any = None) -> None:
        with all_threads():
            update(closure)
        for master in hybrid.param_to_fp32_param.values():
            if master.is_cuda:
                master.grad = None

    hybrid._set_sub_optimizer_grads = bring
    hybrid.step = step


def _prepare(hybrid: HybridDeviceOptimizer) -> None:
    masters = [master for optimizer in hybrid.cpu_optimizers for master in _masters(optimizer)]
    for master, gradient in zip(masters, pinned_like(masters), strict=True):
        master.grad = hybrid.cpu_copy_map_grad[master] = gradient

    def send(optimizer: Any, *_: object) -> None:
        with torch.cuda.stream(hybrid._h2d_stream):
            for master in _masters(optimizer):
                weight = hybrid.cpu_copys_map_gpu_param[master]
                # The gradient has been used: its memory is pinned, and has room for the weight.
                gradient = hybrid.cpu_copy_map_grad[master]
                staged = gradient.view(weight.dtype)[: weight.numel()].copy_(master)
                weight.data.copy_(staged, non_blocking=True)
        torch.cuda.current_stream().wait_stream(hybrid._h2d_stream)

    for optimizer in hybrid.cpu_optimizers:
        optimizer._optimizer_step_post_hooks.clear()  # Megatron-Core's, which sends the masters
        optimizer.register_step_post_hook(send)


def _masters(optimizer: Any) -> list[Tensor]:
    """Flat, fp32."""
    return [master for group in optimizer.param_groups for master in group["params"]]


def pinned_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Uninitialised tensors of the same flat shapes and types, many in one block."""
    sizes = [ALIGNMENT * -(-tensor.nbytes // ALIGNMENT) for tensor in tensors]
    found: dict[int, Tensor] = {}
    for chosen in in_blocks(sizes, BLOCK_BYTES):
        num_bytes = sum(sizes[number] for number in chosen)
        block = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        for number, part in zip(chosen, block.split([sizes[n] for n in chosen]), strict=True):
            tensor = tensors[number]
            found[number] = part[: tensor.nbytes].view(tensor.dtype)
    return [found[number] for number in range(len(tensors))]


def in_blocks(sizes: Sequence[int], largest: int) -> list[list[int]]:
    """Numbers of the tensors that lie in one block together, of a power of two at most `largest`.

    Blocks are filled, largest tensors first; what is larger than `largest` has one of its own.
    """
    blocks: list[list[int]] = []
    left = sorted(range(len(sizes)), key=lambda number: -sizes[number])
    while left:
        room = min(largest, 2 ** (sum(sizes[number] for number in left).bit_length() - 1))
        chosen = left[:1]
        room -= sizes[left[0]]
        for number in left[1:]:
            if sizes[number] <= room:
                chosen.append(number)
                room -= sizes[number]
        blocks.append(chosen)
        taken = set(chosen)
        left = [number for number in left if number not in taken]
    return blocks


@contextmanager
def all_threads() -> Iterator[None]:
    """Inside, torch's work on the host takes this process's share of the processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, share_of_processors()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def share_of_processors() -> int:
    """Processors that this process may use, shared with those that torchrun started beside it."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // beside)
