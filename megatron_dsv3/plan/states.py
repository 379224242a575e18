"""Bytes that stay from step to step, exact: read off the real stage, its buffers and its optimizer.

The stage is built on the meta device as one rank of the whole world, wrapped for data parallelism,
and given the distributed optimizer; nothing is derived from the architecture by hand.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_dsv3.config.sections import PrecisionSection
from megatron_dsv3.model.gpt import DeepseekV3Model
from megatron_dsv3.plan.build import DTYPES, Built
from megatron_dsv3.plan.byte_rules import FP8_COPIES, optimizer_bytes
from megatron_dsv3.plan.records import States, Workload
from megatron_dsv3.plan.stand_ins import is_product

BuildOptimizer = Callable[..., Any]
"""`train.optimizer.build_optimizer`, which lives on this floor and so is handed in."""

GEMM_WORKSPACES = 6 * 32 * 2**20
"""cuBLAS's on Hopper: torch's, Transformer Engine's, and four of its grouped products."""


def count_states(built: Built, workload: Workload, build_optimizer: BuildOptimizer) -> States:
    """Of the rank whose chunks were built."""
    dtype = DTYPES[workload.precision.compute]
    # Where masters and moments are is a matter of bytes: the parts are those of the plain one.
    plain = workload.optimizer.model_copy(update={"moments": "fp32", "offload_fraction": 0.0})
    optimizer = build_optimizer(plain, built.wrapped, dtype=dtype)
    own = sum(
        parameter.numel()
        for part in optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for parameter in group["params"]
    )
    each = optimizer_bytes(workload.optimizer, workload.precision)
    buffers = list(_buffers(built.wrapped))
    parameters = [p for chunk in built.chunks for p in chunk.parameters()]
    trained = [p for p in parameters if p.requires_grad]
    frozen = [p for p in parameters if not p.requires_grad]
    return States(
        parameters=sum(p.numel() for p in trained),
        weights=sum(_nbytes(buffer.param_data) for buffer in buffers)
        + sum(_nbytes(tensor) for tensor in frozen),
        gradients=sum(_nbytes(buffer.grad_data) for buffer in buffers),
        optimizer=int(own * each.gpu),
        optimizer_host=int(own * each.host),
        caches=_caches(built.chunks, workload.precision),
    )


def _buffers(wrapped: Iterable[DistributedDataParallel]) -> Iterator[Any]:
    for module in wrapped:
        yield from (*module.buffers, *module.expert_parallel_buffers)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _caches(chunks: Sequence[DeepseekV3Model], precision: PrecisionSection) -> int:
    """What Transformer Engine keeps beside weights and gradients."""
    weights = [
        (module.precision, weight)
        for chunk in chunks
        for module in chunk.modules()
        if is_product(module)
        for name, weight in module.named_parameters(recurse=False)
        if name != "layer_norm_weight"
    ]
    products = [weight for _, weight in weights]
    heads = [chunk.get_parameter("output_layer.weight") for chunk in chunks if chunk.post_process]
    # Gradients go straight into their buffer; autograd gets an empty bf16 tensor of the shape.
    shapes = {weight.shape for weight in products + heads if weight.requires_grad}
    empty = sum(2 * shape.numel() for shape in shapes)
    copied = [w.numel() for name, w in weights if name != "bf16" and not precision.fp8_params]
    return int(GEMM_WORKSPACES + empty + FP8_COPIES * sum(copied))
