"""Megatron-Core's offloading of activations on the meta device: host memory is a sum of bytes.

Which tensors go, when they come back, and what stays because it is needed at once is decided by
Megatron-Core's own manager. Here are the copies, and what of it asks for a GPU.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.extensions import transformer_engine
from megatron.core.pipeline_parallel import fine_grained_activation_offload as offload
from torch import Tensor, nn

MANAGER = offload.PipelineOffloadManager


@dataclass(slots=True)
class HostMemory:
    """Copies that wait in host memory."""

    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Away:
    """A tensor that is in host memory."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@contextmanager
def on_meta() -> Iterator[None]:
    """Inside, models can be built and run that offload; the manager is gone afterwards."""
    names: list[tuple[Any, dict[str, Any]]] = [
        # FP8 modules hold the tensor that is offloaded: `build` tells the stand-ins.
        (transformer_engine, {"set_save_original_input": lambda _: None}),
        (transformer_engine, {"cpu_offload": SimpleNamespace(CPUOffloadEnabled=False)}),
        (offload, {"print_offload_summary_table": lambda _: None}),
        (offload.ChunkOffloadHandler, {"_can_manage_tensor_for_offload": staticmethod(_is_ours)}),
        (MANAGER, {"init_model_chunk_offload_handler": _init_alone(MANAGER)}),
        (MANAGER, {"OFFLOAD_MGR": None}),
    ]
    with ExitStack() as stack:
        for owner, values in names:
            stack.enter_context(patch.multiple(owner, **values))
        yield


@contextmanager
def copies() -> Iterator[HostMemory]:
    """A manager that has seen no micro-batch yet; what it puts into host memory."""
    host = HostMemory()

    def away(_: object, tensor: Tensor, **__: object) -> tuple[_Away]:
        copy = _Away(tensor.shape, tensor.dtype)
        host.num_bytes += copy.num_bytes
        return (copy,)

    def back(_: object, state: tuple[_Away], **__: object) -> Tensor:
        (copy,) = state
        host.num_bytes -= copy.num_bytes
        return torch.empty(copy.shape, dtype=copy.dtype, device="meta")

    MANAGER.reset_instance()
    with patch.multiple(offload.ChunkOffloadHandler, offload=away, reload=back):
        yield host


def next_step() -> None:
    """From now on, as in every step but the first: what backward needs at once stays."""
    MANAGER.get_instance().reset()


def _is_ours(tensor: Tensor) -> bool:
    return tensor.is_meta and not isinstance(tensor, nn.Parameter)


def _init_alone(manager: Any) -> Any:
    original = manager.init_model_chunk_offload_handler

    def init(self: Any, pp_rank: int, vp_size: int, vp_stage: int, *args: Any, **more: Any) -> None:
        """Chunks are counted one by one: each is the only one of its stage."""
        original(self, pp_rank, 1, None, *args, **more)

    return init
