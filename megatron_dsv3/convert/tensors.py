"""Whole Hugging Face tensors <-> one rank's shard of a Megatron parameter; pure functions.

A parameter joined from several HF tensors is split tensor by tensor and joined after that: rank r
of `linear_fc1` holds [gate_r; up_r], never a cut through [gate; up].
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dsv3.convert.mapping import Param, Shape


@dataclass(frozen=True, slots=True)
class HfSlice:
    """What one rank needs of one HF tensor: `[start, stop)` of `dim`, all of the other dims."""

    name: str
    dim: int
    start: int
    stop: int

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index that cuts it out of the whole tensor."""
        return (slice(None),) * self.dim + (slice(self.start, self.stop),)


def hf_slices(param: Param, rank: int, size: int) -> tuple[HfSlice, ...]:
    """What one rank of the group that shards `param` needs of each tensor in `param.hf`.

    Raises:
        ValueError: `size` does not divide the split dim.
    """
    if not 0 <= rank < size:
        raise ValueError(f"{param.mcore}: rank {rank} is not one of {size} ranks")
    dim = param.shard.value
    if dim is None:
        return tuple([HfSlice(name, 0, 0, param.hf_shape[0]) for name in param.hf])
    if param.hf_shape[dim] % size:
        raise ValueError(
            f"{param.hf[0]}: dim {dim} of {list(param.hf_shape)} does not split into {size} equal "
            f"parts; choose a tensor-parallel size that divides {param.hf_shape[dim]}"
        )
    step = param.hf_shape[dim] // size
    return tuple([HfSlice(name, dim, rank * step, (rank + 1) * step) for name in param.hf])


def shard_shape(param: Param, size: int) -> Shape:
    """Shape of the Megatron parameter on each of the `size` ranks that shard it."""
    rows, *rest = _piece_shape(param, size)
    return (len(param.hf) * rows, *rest)


def join(param: Param, pieces: Sequence[Tensor], size: int) -> Tensor:
    """One rank's shard from the pieces that `hf_slices` names, in its order.

    A single piece is returned as it is, without a copy.
    """
    for name, piece in zip(param.hf, pieces, strict=True):
        _check(name, piece, _piece_shape(param, size))
    return torch.cat(tuple(pieces)) if len(pieces) > 1 else pieces[0]


def pieces_of(param: Param, shard: Tensor, size: int) -> tuple[Tensor, ...]:
    """Undoes `join`: views of a shard, one for each name in `param.hf`.

    Copying into them fills a live parameter without a joined copy of it.
    """
    _check(param.mcore, shard, shard_shape(param, size))
    return shard.chunk(len(param.hf))


def to_shard(param: Param, parts: Sequence[Tensor], rank: int, size: int) -> Tensor:
    """One rank's shard from whole HF tensors.

    Args:
        param: The parameter being filled.
        parts: One whole HF tensor for each name in `param.hf`, each of shape `param.hf_shape`.
        rank: Rank inside the group that shards `param`.
        size: Size of that group.
    """
    for name, part in zip(param.hf, parts, strict=True):
        _check(name, part, param.hf_shape)
    cuts = hf_slices(param, rank, size)
    return join(param, [part[cut.slices] for part, cut in zip(parts, cuts, strict=True)], size)


def from_shards(param: Param, shards: Sequence[Tensor]) -> list[Tensor]:
    """Undoes `to_shard`: all ranks' shards, in rank order -> one whole tensor a name in `param.hf`.

    Shards of a parameter that is not split must be replicas; the first one is taken.
    """
    pieces = [pieces_of(param, shard, len(shards)) for shard in shards]
    dim = param.shard.value
    if dim is None or len(shards) == 1:
        return list(pieces[0])
    return [torch.cat(parts, dim) for parts in zip(*pieces, strict=True)]


def row_spans(shape: Shape, *, elements: int, multiple: int = 1) -> Iterator[slice]:
    """Cuts dim 0 so that each part has at most about that many elements.

    Args:
        shape: Of the tensor.
        elements: Wanted most; one `multiple` of rows may be more.
        multiple: Of which each part's number of rows is, the last one's excepted.
    """
    num_rows, *rest = shape
    step = max(1, elements // (math.prod(rest) * multiple)) * multiple
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _piece_shape(param: Param, size: int) -> Shape:
    """Shape of what one rank needs of each HF tensor."""
    cut = hf_slices(param, 0, size)[0]
    return tuple(
        [cut.stop - cut.start if dim == cut.dim else n for dim, n in enumerate(param.hf_shape)]
    )


def _check(name: str, tensor: Tensor, expected: Shape) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: expected shape {list(expected)}, got {list(tensor.shape)}")
