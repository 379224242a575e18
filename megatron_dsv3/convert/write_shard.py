"""Writes one planned shard of a Hugging Face directory, holding some rows of one tensor.

What it costs in accuracy is measured on the way, while the numbers are in the processor's cache.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
"""Of a tensor at a time: more gains nothing, and a thread needs about 20 bytes for each."""
_THREADS = 2
"""That read and round pieces, beside the one that writes: reading and arithmetic then overlap."""


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
        piece_bytes: Largest piece of a tensor, in fp32, if 128 rows of it are not more; three are
            held at once.
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
        done = _ahead(lambda piece: _store(*piece, source, original), pieces)
        for (tensor, _), stored in zip(pieces, done, strict=True):
            for name, numbers in stored.tensors.items():
                writer.append(name, numbers)
                on_bytes(numbers.nbytes)
            errors[tensor].append(stored.error)
    totals = [TensorError(t.name, t.kind, Error.total(parts)) for t, parts in errors.items()]
    return WrittenShard(writer.parts, totals)


def _ahead[Piece, Result](
    work: Callable[[Piece], Result], pieces: Iterable[Piece]
) -> Iterator[Result]:
    """`map` by `_THREADS` threads, which are never more than so many pieces ahead."""
    with ThreadPoolExecutor(_THREADS) as pool:
        pending: deque[Future[Result]] = deque()
        for piece in pieces:
            pending.append(pool.submit(work, piece))
            if len(pending) > _THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


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
class _Stored:
    """Some rows of a tensor as they go into the file, by name."""

    tensors: Mapping[str, Tensor]
    error: Error


def _store(
    tensor: PlannedTensor, rows: slice, source: Source, original: HFReader | None
) -> _Stored:
    """Reads and rounds some rows, whole blocks of them."""
    read = source.read(tensor.original, rows)
    if not tensor.is_fp8:
        kept = read.to(tensor.info.dtype)
        is_exact = torch.promote_types(read.dtype, kept.dtype) == kept.dtype
        return _Stored({tensor.name: kept}, Error() if is_exact else _error(read, kept.float()))
    if original is None:
        result = quantize_measured(read, name=tensor.name)
    else:
        kept_from = original.read_fp8(tensor.name, rows)
        result = requantize(read, kept_from, name=tensor.name)
    stored = {tensor.name: result.weight, tensor.name + SCALE_SUFFIX: result.scale_inv}
    num_blocks = result.scale_inv.numel()
    return _Stored(stored, Error(result.squares, result.norm, num_blocks, result.num_kept))


def _error(read: Tensor, back: Tensor) -> Error:
    before = read.float().flatten()
    difference = back.flatten().sub_(before)
    return Error(float(difference.dot(difference)), float(before.dot(before)))
