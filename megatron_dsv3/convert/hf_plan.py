"""Which tensor goes into which shard of a Hugging Face directory, known before any byte is read.

The plan follows from the architecture alone, so every process of a conversion makes the same one.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.convert.fp8 import SCALE_SUFFIX, scale_shape
from megatron_dsv3.convert.hf_io import shard_names
from megatron_dsv3.convert.mapping import expand, exported_copies
from megatron_dsv3.convert.safetensors_file import TensorInfo

Precision = Literal["bf16", "fp8", "fp32"]
"""Of the weights; fp8: of those that DeepSeek quantises, the others are bf16."""
_DTYPES: Mapping[Precision, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp8": torch.bfloat16,
    "fp32": torch.float32,
}
_LAYER = re.compile(r"^model\.layers\.\d+\.")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of a shard."""

    name: str
    original: str
    """What it is read from; not its own name for MTP's copies of embedding and head."""
    info: TensorInfo
    """As it is stored."""

    @property
    def is_fp8(self) -> bool:
        """Whether it is stored in blocks, with scales beside it."""
        return self.info.dtype == torch.float8_e4m3fn

    @property
    def kind(self) -> str:
        """The name without layer and expert."""
        return _EXPERT.sub("*", _LAYER.sub("", self.name))

    @property
    def layout(self) -> dict[str, TensorInfo]:
        """What of it is in the file: the tensor, and its scales."""
        layout = {self.name: self.info}
        if self.is_fp8:
            scales = TensorInfo(torch.float32, scale_shape(self.info.shape))
            layout[self.name + SCALE_SUFFIX] = scales
        return layout

    @property
    def nbytes(self) -> int:
        """Bytes in the file, scales included."""
        return sum(info.nbytes for info in self.layout.values())


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One safetensors file."""

    file: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def layout(self) -> dict[str, TensorInfo]:
        """All that is in the file."""
        return {name: info for part in self.tensors for name, info in part.layout.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all numbers; the header takes about 100 a tensor more."""
        return sum(part.nbytes for part in self.tensors)


def plan_shards(
    arch: Architecture, *, precision: Precision, shard_bytes: int = 5_000_000_000
) -> tuple[ShardPlan, ...]:
    """All shards of a checkpoint, MTP's copies included; in the model's order.

    Args:
        arch: Of the whole model.
        precision: Of the weights; `expert_bias` is fp32 in all of them.
        shard_bytes: Largest shard; a larger tensor gets one of its own.
    """
    groups: list[list[PlannedTensor]] = []
    size = math.inf
    for tensor in _tensors(arch, precision):
        if size + tensor.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return tuple(map(ShardPlan, shard_names(len(groups)), map(tuple, groups)))


def _tensors(arch: Architecture, precision: Precision) -> Iterator[PlannedTensor]:
    dtype = _DTYPES[precision]
    originals: dict[str, TensorInfo] = {}
    for param in expand(arch):
        kept = torch.float32 if param.is_buffer else dtype
        stored = torch.float8_e4m3fn if precision == "fp8" and param.quantised else kept
        info = TensorInfo(stored, param.hf_shape)
        originals |= dict.fromkeys(param.hf, info)
        yield from (PlannedTensor(name, name, info) for name in param.hf)
    for copy, original in exported_copies(arch).items():
        yield PlannedTensor(copy, original, originals[original])
