"""Which documents share a row: best-fit decreasing, without splitting any.

Documents are placed from the longest to the shortest, each into the row with the least room that
still holds it. What matters is only how much room a row has, so rows are kept by their room and all
documents of one length are placed at once: the work grows with the number of distinct lengths, not
of documents.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Packs:
    """Documents by row. Row i holds `documents[bounds[i] : bounds[i + 1]]`, in ascending order."""

    documents: Indices
    """[documents], each once."""
    bounds: Indices
    """[rows + 1]"""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, row: int) -> Indices:
        return self.documents[self.bounds[row] : self.bounds[row + 1]]


def shuffled(num: int, *, seed: int, epoch: int) -> Indices:
    """A permutation of `num` indices.

    Sorts Philox's raw output, keyed by seed and epoch: numpy promises that stream for good, which
    it doesn't for `Generator.permutation`, and a run may be resumed under another numpy.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected 0 to 2**64 - 1, got {seed}")
    philox = np.random.Philox(key=np.array([seed, epoch], np.uint64))
    return np.argsort(philox.random_raw(num), kind="stable")


def pack(
    lengths: npt.NDArray[np.integer], *, row_length: int, multiple: int = 1, seed: int = 0
) -> Packs:
    """Packs all documents.

    Args:
        lengths: [documents], tokens of each, at least 1.
        row_length: Tokens of a row.
        multiple: A document takes up its length rounded up to this.
        seed: Decides which of the documents of one length go where; same seed, same packs.

    Raises:
        ValueError: A document is empty or longer than a row, or the seed is no key.
    """
    if not len(lengths):
        return Packs(np.zeros(0, np.int64), np.zeros(1, np.int64))
    room = row_length // multiple
    units = -(-lengths.astype(np.int64) // multiple)
    if units.min() < 1 or units.max() > room:
        index = int(np.flatnonzero((units < 1) | (units > room))[0])
        raise ValueError(
            f"document {index} of {lengths[index]} tokens does not fit a row of {row_length} "
            f"(documents take multiples of {multiple})"
        )
    order = shuffled(len(units), seed=seed, epoch=0)
    order = order[np.argsort(-units[order], kind="stable")]
    rows = np.concatenate(list(_place(np.bincount(units), room)))
    num_rows = int(rows.max()) + 1
    by_row = np.lexsort((order, rows))
    bounds = np.searchsorted(rows[by_row], np.arange(num_rows + 1))
    return Packs(order[by_row], bounds)


def _place(counts: Indices, room: int) -> Iterator[Indices]:
    """Rows of the documents, the longest first.

    Args:
        counts: [longest + 1], documents of each length.
        room: Of an empty row.
    """
    rows = _OpenRows(room)
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            # After a document the row has less room than any other that was open: it is the best
            # fit for the next of this length, too, until none goes in any more.
            space, taken = rows.take(length, left)
            per_row = space // length
            full, rest = divmod(min(left, per_row * len(taken)), per_row)
            yield taken[:full].repeat(per_row)
            rows.put(taken[:full], space - per_row * length)
            if rest:
                yield taken[full : full + 1].repeat(rest)
                rows.put(taken[full : full + 1], space - rest * length)
            left -= full * per_row + rest


class _OpenRows:
    """Rows by the room they have left."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.by_space: list[list[Indices]] = [[] for _ in range(room + 1)]
        self.is_there = np.zeros(room + 1, np.bool_)
        self.is_there[room] = True  # an empty row is always to be had
        self.num_rows = 0

    def take(self, length: int, wanted: int) -> tuple[int, Indices]:
        """Least space that holds `length`, and rows of it: enough for `wanted`, or all."""
        space = length + int(self.is_there[length:].argmax())
        num_rows = math.ceil(wanted / (space // length))
        if space == self.room:
            self.num_rows += num_rows
            return space, np.arange(self.num_rows - num_rows, self.num_rows)
        chunks = self.by_space[space]
        rows = chunks.pop() if len(chunks) == 1 else np.concatenate(chunks)
        rest = rows[num_rows:]
        self.by_space[space] = [rest] if len(rest) else []
        self.is_there[space] = bool(len(rest))
        return space, rows[:num_rows]

    def put(self, rows: Indices, space: int) -> None:
        if len(rows) and space:
            self.by_space[space].append(rows)
            self.is_there[space] = True


def fill(packs: Packs, lengths: npt.NDArray[np.integer], *, row_length: int) -> float:
    """Share of the rows' positions that hold a token."""
    return float(lengths[packs.documents].sum(dtype=np.int64)) / (max(len(packs), 1) * row_length)
