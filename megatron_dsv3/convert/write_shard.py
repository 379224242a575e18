"""Writes one planned shard of a Hugging Face directory, holding some rows of one tensor.

What it costs in accuracy is measured on the way, while the numbers are in the processor's cache.
"""

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_dsv3.convert.direct_file import Part
from megatron_dsv3.convert.error_report import Error, TensorError
from megatron_dsv3.convert.fp8 import (
    BLOCK,
    SCALE_SUFFIX,
    quantize_measured,
    requantize,
)
from megatron_dsv3.convert.hf_index import listed
from megatron_dsv3.convert.hf_io import HFReader
from megatron_dsv3.convert.hf_plan import PlannedTensor, ShardPlan
from megatron_dsv3.convert.memory import PIECE_BYTES
from megatron_dsv3.convert.safetensors_file import SafetensorsWriter, TensorInfo
from megatron_dsv3.convert.sources import Source
from megatron_dsv3.convert.tensors import row_spans

_ELEMENTS = 1 << 21
"""Of a tensor at a time: more gains nothing, and a process needs about 20 bytes for each."""


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """A finished file."""

    parts: Sequence[Part]
    """All its bytes, in order."""
    errors: Sequence[TensorError]
    """Of each tensor."""


def write_shard(
    shard: ShardPlan,
    source: Source,
    path: Path,
    *,
    original: HFReader | None = None,
    piece_bytes: int = PIECE_BYTES,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> WrittenShard:
    """Writes and syncs a shard.

    Args:
        shard: What goes into it.
        source: Where the numbers come from.
        path: The file; one that exists is overwritten.
        original: An FP8 checkpoint whose bytes are kept where they stand for the same numbers.
        piece_bytes: Most that is held of a tensor in fp32, if 128 rows of it are not more.
        on_bytes: Told the bytes of each piece that was written.
    """
    elements = min(_ELEMENTS, piece_bytes // 4)
    pieces = [
        (tensor, rows)
        for tensor in shard.tensors
        for rows in row_spans(tensor.info.shape, elements=elements, multiple=BLOCK)
    ]
    errors: dict[PlannedTensor, list[Error]] = defaultdict(list)
    with SafetensorsWriter(path, shard.layout) as writer:
        target = _Target(writer, original, on_bytes)
        numbers = _one_ahead(lambda piece: source.read(piece[0].original, piece[1]), pieces)
        for (tensor, rows), read in zip(pieces, numbers, strict=True):
            errors[tensor].append(_write_rows(tensor, rows, read, target))
    totals = [TensorError(t.name, t.kind, Error.total(parts)) for t, parts in errors.items()]
    return WrittenShard(writer.parts, totals)


def _one_ahead[Piece, Result](
    read: Callable[[Piece], Result], pieces: Iterable[Piece]
) -> Iterator[Result]:
    """`map` with the next piece being read, in a thread, while one is at work."""
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for piece in pieces:
            upcoming = pool.submit(read, piece)
            if pending is not None:
                yield pending.result()
            pending = upcoming
        if pending is not None:
            yield pending.result()


def check_original(original: HFReader, shards: Sequence[ShardPlan]) -> None:
    """Whether an FP8 checkpoint has what this plan would take from it.

    Raises:
        ValueError: All tensors that it lacks, or has in another shape or type.
    """
    known = set(original.names())
    wrong = [
        f"{tensor.name} expected {tensor.info} got {_stored_as(original, tensor.name, known)}"
        for shard in shards
        for tensor in shard.tensors
        if tensor.is_fp8
        and (
            tensor.name not in known
            or not original.is_fp8(tensor.name)
            or original.shape(tensor.name) != tensor.info.shape
        )
    ]
    if wrong:
        problem = listed("tensors are not those whose scales are to be kept", wrong)
        raise ValueError(
            f"{original.directory}: {problem}; name the FP8 checkpoint that training started from"
        )


def _stored_as(original: HFReader, name: str, known: Container[str]) -> str:
    if name not in known:
        return "nothing"
    kind = torch.float8_e4m3fn if original.is_fp8(name) else original.dtype(name)
    return str(TensorInfo(kind, original.shape(name)))


@dataclass(frozen=True, slots=True)
class _Target:
    """Where rows of a tensor go."""

    writer: SafetensorsWriter
    original: HFReader | None
    on_bytes: Callable[[int], None]

    def append(self, name: str, rows: Tensor) -> None:
        """Writes the next rows."""
        self.writer.append(name, rows)
        self.on_bytes(rows.nbytes)


def _write_rows(tensor: PlannedTensor, rows: slice, read: Tensor, target: _Target) -> Error:
    """Writes some rows, whole blocks of them."""
    if not tensor.is_fp8:
        kept = read.to(tensor.info.dtype)
        target.append(tensor.name, kept)
        is_exact = torch.promote_types(read.dtype, kept.dtype) == kept.dtype
        return Error() if is_exact else _error(read, kept.float())
    if target.original is None:
        result = quantize_measured(read, name=tensor.name)
    else:
        kept_from = target.original.read_fp8(tensor.name, rows)
        result = requantize(read, kept_from, name=tensor.name)
    target.append(tensor.name, result.weight)
    target.append(tensor.name + SCALE_SUFFIX, result.scale_inv)
    return Error(result.squares, result.norm, result.scale_inv.numel(), result.num_kept)


def _error(read: Tensor, back: Tensor) -> Error:
    before = read.float().flatten()
    difference = back.flatten().sub_(before)
    return Error(float(difference.dot(difference)), float(before.dot(before)))
