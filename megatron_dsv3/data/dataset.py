"""Rows of documents from a store, the order they are trained in, and a position to resume from.

Order and position know nothing of data parallelism: a position counts the rows that all ranks
together have consumed, so a run may go on with another number of ranks.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_dsv3.data.packing import Packs, fill, pack, shuffled
from megatron_dsv3.data.store import Sample, Store

Documents = tuple[Sample, ...]
"""What shares a row."""
TooLong = Literal["drop", "truncate", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOptions:
    """How the samples of a store go into rows."""

    length: int
    """Tokens of a row."""
    packed: bool = True
    """False: one sample a row."""
    multiple: int = 1
    """A document takes up a multiple of this."""
    too_long: TooLong = "drop"
    """What becomes of a sample longer than a row."""
    seed: int = 0
    """Of the packing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsReport:
    """What came of the samples; each is kept or in one of the counts beside it."""

    rows: int
    samples: int
    """Kept, truncated ones among them."""
    tokens: int
    """In the samples kept, as are `counted_tokens`."""
    counted_tokens: int
    too_long: int
    """Dropped for their length."""
    truncated: int
    without_counted: int
    """Dropped because truncation left no counted token."""
    lost_tokens: int
    """In samples dropped, and behind the end of truncated ones."""
    fill: float
    """Share of the rows' positions that hold a token."""


class Rows:
    """The rows of a store, each read when it is asked for."""

    def __init__(self, store: Store, options: RowOptions) -> None:
        """Packs the samples, by their lengths alone.

        Raises:
            ValueError: A sample is too long, where that is an error, or none is left.
        """
        self.store, self.options = store, options
        long = [_Long.of(store, number, options) for number in _longer(store, options.length)]
        keep = np.ones(len(store), np.bool_)
        keep[[sample.number for sample in long if not sample.counted_kept]] = False
        self._kept = np.flatnonzero(keep)
        lengths = np.minimum(store.lengths[self._kept], options.length)
        self._packs = _packs(lengths, options)
        self.report = self._account(long, lengths)
        if not len(self):
            report = self.report
            raise ValueError(
                f"{store.directory}: no sample left of {len(store)}: {report.too_long} longer than "
                f"{options.length} tokens, {report.without_counted} with no counted token in "
                "those; raise the sequence length"
            )

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, row: int) -> Documents:
        length = self.options.length
        samples = (self.store.sample(number) for number in self._kept[self._packs[row]].tolist())
        return tuple(Sample(s.id, s.tokens[:length], s.loss[:length]) for s in samples)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens and loss spans, and of which samples are in which row."""
        digest = hashlib.sha256(str(self.options.length).encode())
        for name in ("tokens.bin", "tokens.idx", "spans.bin", "spans.idx"):
            digest.update(self.store.manifest.files[name].sha256.encode())
        for part in (self._kept, self._packs.documents, self._packs.bounds):
            digest.update(part.astype("<i8").data)
        return digest.hexdigest()

    def _account(self, long: Sequence["_Long"], lengths: npt.NDArray[np.int32]) -> RowsReport:
        options, manifest = self.options, self.store.manifest
        num_cut = sum(sample.counted_kept > 0 for sample in long)
        dropped = len(long) - num_cut
        truncates = options.too_long == "truncate"
        tokens = int(lengths.sum(dtype=np.int64))
        return RowsReport(
            rows=len(self),
            samples=len(lengths),
            tokens=tokens,
            counted_tokens=manifest.num_counted - sum(s.counted - s.counted_kept for s in long),
            too_long=0 if truncates else dropped,
            truncated=num_cut,
            without_counted=dropped if truncates else 0,
            lost_tokens=manifest.num_tokens - tokens,
            fill=fill(self._packs, lengths, row_length=options.length),
        )


class _Long(NamedTuple):
    """A sample that is longer than a row."""

    number: int
    counted: int
    """Counted tokens."""
    counted_kept: int
    """Those that remain; 0: the sample is dropped."""

    @classmethod
    def of(cls, store: Store, number: int, options: RowOptions) -> "_Long":
        if options.too_long == "error":
            raise ValueError(
                f"{store.id(number)}: {store.lengths[number]} tokens, but the sequence length is "
                f"{options.length}; raise it, or drop or truncate such samples"
            )
        spans = store.spans(number)
        kept = np.minimum(spans, options.length if options.too_long == "truncate" else 0)
        return cls(number, *(int((part[:, 1] - part[:, 0]).sum()) for part in (spans, kept)))


def _longer(store: Store, length: int) -> list[int]:
    longer: list[int] = np.flatnonzero(store.lengths > length).tolist()
    return longer


def _packs(lengths: npt.NDArray[np.int32], options: RowOptions) -> Packs:
    if options.packed:
        return pack(
            lengths, row_length=options.length, multiple=options.multiple, seed=options.seed
        )
    numbers = np.arange(len(lengths) + 1)
    return Packs(numbers[:-1], numbers)


# ---- Order --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Position:
    """How far a run is: `sample` rows of epoch `epoch` are consumed, over all ranks."""

    epoch: int = 0
    sample: int = 0


class GlobalBatch(NamedTuple):
    """The rows of one optimizer step, and the position after it."""

    after: Position
    rows: list[int | None]
    """Numbers of rows; None: a row without documents."""


def global_batches(
    num_rows: int,
    *,
    global_batch_size: int,
    seed: int,
    position: Position = Position(),
    num_epochs: int | None = None,
) -> Iterator[GlobalBatch]:
    """Global batches from a position on; endless without `num_epochs`.

    A batch that an epoch can't fill goes on with the next epoch's rows, so steps are of equal size
    and none is lost. At the end of the run there is no next epoch: empty rows fill the last batch,
    and every row has been seen exactly `num_epochs` times.
    """
    if not 0 <= position.sample < num_rows:
        raise ValueError(
            f"position: row {position.sample} of an epoch of {num_rows}; "
            "are these the data that the run began with?"
        )
    batch: list[int | None] = []
    epoch, start = position.epoch, position.sample
    while num_epochs is None or epoch < num_epochs:
        order = shuffled(num_rows, seed=seed, epoch=epoch).tolist()
        for consumed in range(start, num_rows):
            batch.append(order[consumed])
            if len(batch) == global_batch_size:
                yield GlobalBatch(_position(epoch, consumed + 1, num_rows), batch)
                batch = []
        epoch, start = epoch + 1, 0
    if batch:
        batch += [None] * (global_batch_size - len(batch))
        yield GlobalBatch(Position(epoch, 0), batch)


def _position(epoch: int, consumed: int, num_rows: int) -> Position:
    return Position(epoch + consumed // num_rows, consumed % num_rows)


def rank_micro_batches[T](
    rows: Sequence[T], *, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[list[T]]:
    """One rank's micro-batches of a global batch.

    The global batch is cut into micro-batches in order, and dealt out like cards: micro-batch k
    goes to rank k % dp_size. The micro-batches are then the same at every data-parallel size.
    """
    if len(rows) % (micro_batch_size * dp_size):
        raise ValueError(
            f"global_batch_size ({len(rows)}) must be a multiple of micro_batch_size "
            f"({micro_batch_size}) * dp ({dp_size}) = {micro_batch_size * dp_size}"
        )
    micro_batches = [list(batch) for batch in batched(rows, micro_batch_size)]
    return micro_batches[dp_rank::dp_size]
