"""Lets Megatron-Core's hard-coded CUDA calls run on a CPU; the only monkeypatching of the package.

Each patch is plumbing (device, stream, random state, missing optional imports), never the model's
meaning, and carries its reason. `enable()` is called once, before the first Megatron-Core object is
built; nothing here runs on a machine whose job uses CUDA.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_dsv3.model.cpu_adam import FusedAdam

CPU = torch.device("cpu")
_enabled = False
_device = CPU
"""What Megatron-Core gets where it names "cuda"."""


def enable() -> None:
    """Applies all patches, once."""
    # Megatron-Core refuses a model whose choice of attention is not that of these, which a job's
    # script may have set for its GPUs, or Megatron-Core in the process that started this one.
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)
    global _enabled  # patching is per process, and so is this flag
    if _enabled:
        return
    _enabled = True
    for patch in (_devices, _streams, _random_state, _optional_imports, _dispatcher, _optimizer):
        patch()
    # Kept on for the rest of the process: Megatron-Core names "cuda" in hundreds of places.
    _CudaMeansCpu().__enter__()


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Inside, "cuda" is the meta device: shapes and marks of a rank of any size, without memory."""
    global _device
    assert _enabled
    _device = torch.device("meta")
    try:
        yield
    finally:
        _device = CPU


def _devices() -> None:
    torch.cuda.current_device = lambda: _device  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(torch.cuda, name, lambda *_, **__: 0)


class _Stream:
    """A CPU works in program order, so every stream operation is already done."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_stream(self, *_: object) -> None:
        pass

    def wait_event(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        return event or _Event()


class _Event:
    """Always reached."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def record(self, *_: object) -> None:
        pass

    def wait(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


def _streams() -> None:
    stream = _Stream()
    torch.cuda.Stream = _Stream  # type: ignore[assignment, misc]
    torch.cuda.Event = _Event  # type: ignore[assignment, misc]
    torch.cuda.current_stream = lambda *_: stream  # type: ignore[assignment]
    torch.cuda.default_stream = lambda *_: stream  # type: ignore[assignment]
    # Gradient buffers re-enter one context object, so it must be re-enterable.
    torch.cuda.stream = contextlib.nullcontext  # type: ignore[assignment]
    Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]


def _random_state() -> None:
    """Megatron-Core's tracker of model-parallel random states, kept in the CPU generator."""
    from megatron.core.tensor_parallel import random as mcore_random

    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))  # type: ignore[assignment]
    # torch.manual_seed itself calls this one; the default generator is seeded by then.
    torch.cuda.manual_seed_all = lambda *_: None
    mcore_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # The original restores a CPU state of its own on exit, which undoes the tracker's advance.
    mcore_random.CudaRNGStatesTracker.fork = _fork


@contextlib.contextmanager
def _fork(self: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    outer = torch.get_rng_state()
    torch.set_rng_state(self.states_[name])
    try:
        yield
    finally:
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outer)


def _optional_imports() -> None:
    """Names that Megatron-Core leaves undefined, or wrongly true, without Transformer Engine."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.tensor_parallel import random as mcore_random
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    if not transformer_engine.HAVE_TE:
        multi_latent_attention.HAVE_TE = False
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if not hasattr(mcore_random, "FP8GlobalStateManager"):
        # CheckpointWithoutOutput(fp8=False) takes `False is not None` for "FP8 is on".
        mcore_random.FP8GlobalStateManager = _NoFP8
        mcore_random.activation_recompute_forward = lambda **_: contextlib.nullcontext()
        mcore_random.fp8_autocast = lambda **_: contextlib.nullcontext()


class _NoFP8:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False

    @staticmethod
    def get_fp8_recipe() -> None:
        return None


def _dispatcher() -> None:
    """all_to_all_single wants its splits as plain numbers; only CUDA tensors were converted."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = to_cpu


def _optimizer() -> None:
    """The distributed optimizer cannot restore torch's Adam: give it ours, as if it were apex's."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam = distrib_optimizer.Adam = FusedAdam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


class _CudaMeansCpu(torch.overrides.TorchFunctionMode):
    """Reads device "cuda" as CPU, `Tensor.cuda()` as the tensor, pinned memory as plain memory."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if options.get("pin_memory"):
            options["pin_memory"] = False
        if _is_cuda(options.get("device")):
            options["device"] = _device
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1 and not options:
            # Gradient buckets and the optimizer sort parameters by these names.
            return func(*args).replace("torch.meta.", "torch.").replace("torch.", "torch.cuda.", 1)
        if func is Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _device, *args[2:])
        return func(*args, **options)


def _is_cuda(device: object) -> bool:
    if isinstance(device, bool) or device is None:
        return False
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) or (isinstance(device, torch.device) and device.type == "cuda")
