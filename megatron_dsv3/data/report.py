"""What became of the input: every row, sample and token counted, and how they are distributed.

Rows read = rows kept + faulty rows + rows without a sample; samples = samples kept + those
dropped, by reason. Distributions are counted in fixed bins, so memory doesn't grow with the input,
except for 4 bytes a sample: packing needs all lengths.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_dsv3.data.packing import fill, pack
from megatron_dsv3.data.pipeline import Block, Prepared

_NUM_LONGEST = 10
_NUM_EXAMPLES = 20
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
# Four bins an octave up to a million tokens, and whatever is longer.
_LENGTH_EDGES = 2.0 ** (np.arange(81) / 4)
# Without an edge at 1: what is full is in the last bin.
_SHARE_EDGES = np.arange(40) / 40


@dataclass(frozen=True, slots=True)
class Histogram:
    """counts: [bins]; bin i holds values from edges[i] up to edges[i + 1], the last all above."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Histogram2:
    """counts: [bins, bins], reasoning by answer, both over the same edges."""

    edges: tuple[float, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class FileAccount:
    """One input file."""

    path: str
    kind: str
    """What its content was found to be."""
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What became of rows."""

    read: int
    kept: int
    """Gave at least one sample."""
    faulty: int
    without_sample: int
    """In order, but none of their samples was kept."""
    schemas: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What could not be read."""

    by_reason: Mapping[str, int]
    files_given_up: int
    """Faults after which the rest of a file could not be read; how many rows it had is unknown."""
    examples: tuple[str, ...]
    """The first ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleCounts:
    """What became of samples."""

    kept: int
    truncated: int
    """Among those kept."""
    dropped: Mapping[str, int]
    longest: tuple[tuple[str, int], ...]
    """Id and tokens of the longest that did not fit, longest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """In the samples kept, and of those lost for their length."""

    kept: int
    counted: int
    lost: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How the samples fill rows of the sequence length."""

    row_length: int
    rows: int
    fill: float
    fill_of_rows: Histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `report.json` says."""

    rows: Rows
    faults: Faults
    samples: SampleCounts
    tokens: TokenCounts
    packing: Packing
    length_quantiles: Mapping[str, int]
    """Tokens of the samples kept."""
    lengths: Histogram
    lengths_too_long: Histogram
    """Of samples that did not fit, before they were dropped or truncated."""
    counted_share: Histogram
    """Of a sample's tokens, over samples kept."""
    reasoning_answer: Histogram2
    """Tokens of a sample's reasoning and of what follows it, where it has reasoning."""
    not_written: Mapping[str, int]
    """Turns with something that the template doesn't write, by what and why."""
    spelled: Mapping[str, int]
    """Samples whose own words spell a special token, by that token; it stays text there."""
    files: tuple[FileAccount, ...]
    ignored_files: tuple[str, ...]
    seconds: float
    """Until the report was made."""


class Account:
    """Adds up blocks."""

    def __init__(self, *, seq_length: int) -> None:
        self.seq_length = seq_length
        self.num_rows = self.num_kept = self.num_faulty = self.files_given_up = 0
        self.num_truncated = self.lost_tokens = self.num_counted = 0
        self.schemas: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.not_written: Counter[str] = Counter()
        self.spelled: Counter[str] = Counter()
        self.examples: list[str] = []
        self.longest: list[tuple[str, int]] = []
        self.lengths = array("i")
        self.too_long = _Bins(_LENGTH_EDGES)
        self.counted_share = _Bins(_SHARE_EDGES)
        self.reasoning_answer = _Bins(_LENGTH_EDGES[::2], _LENGTH_EDGES[::2])

    def add(self, block: Block) -> None:
        """Takes one in."""
        self.num_rows += block.num_rows
        self.num_kept += block.num_kept
        self.num_truncated += block.num_truncated
        self.lost_tokens += block.lost_tokens
        self.schemas += block.schemas
        self.dropped += block.dropped
        self.not_written += block.not_written
        self.spelled += block.spelled
        self._add_faults(block)
        self._add_samples(block.samples)
        self.too_long.add([length for _, length in block.too_long])
        longest = sorted([*self.longest, *block.too_long], key=lambda named: -named[1])
        self.longest = longest[:_NUM_LONGEST]

    def _add_faults(self, block: Block) -> None:
        for fault in block.faults:
            self.faults[fault.reason] += 1
            self.files_given_up += fault.ends_file
            self.num_faulty += not fault.ends_file
            if len(self.examples) < _NUM_EXAMPLES:
                self.examples.append(fault.message)

    def _add_samples(self, samples: Sequence[Prepared]) -> None:
        lengths = np.array([len(sample.tokens) for sample in samples], np.int32)
        counted = np.array([sample.num_counted for sample in samples])
        self.lengths.frombytes(lengths.tobytes())
        self.num_counted += int(counted.sum())
        self.counted_share.add(counted / np.maximum(lengths, 1))
        thinking = [sample for sample in samples if sample.num_reasoning]
        self.reasoning_answer.add(
            [sample.num_reasoning for sample in thinking],
            [sample.num_answer for sample in thinking],
        )

    def check(self) -> None:
        """Raises a ValueError where nothing is left to train on, with all reasons."""
        if self.lengths:
            return
        reasons = [f"{count} {reason}" for reason, count in self.dropped.items()]
        reasons += [f"{count} rows or files: {reason}" for reason, count in self.faults.items()]
        raise ValueError(
            f"no sample left of {self.num_rows} rows at a sequence length of {self.seq_length} "
            f"tokens: {'; '.join(reasons)}"
        )

    def finish(
        self, *, files: Sequence[FileAccount], ignored: Sequence[str], seconds: float, seed: int
    ) -> Report:
        """The whole account; packs the samples to see how well they fit."""
        lengths = np.frombuffer(self.lengths, np.int32)
        bins = _Bins(_LENGTH_EDGES)
        bins.add(lengths)
        quantiles = np.quantile(lengths, _QUANTILES, method="lower")
        return Report(
            rows=Rows(
                read=self.num_rows,
                kept=self.num_kept,
                faulty=self.num_faulty,
                without_sample=self.num_rows - self.num_kept - self.num_faulty,
                schemas=dict(self.schemas),
            ),
            faults=Faults(
                by_reason=dict(self.faults),
                files_given_up=self.files_given_up,
                examples=tuple(self.examples),
            ),
            samples=SampleCounts(
                kept=len(lengths),
                truncated=self.num_truncated,
                dropped=dict(+self.dropped),
                longest=tuple(self.longest),
            ),
            tokens=TokenCounts(
                kept=int(lengths.sum(dtype=np.int64)),
                counted=self.num_counted,
                lost=self.lost_tokens,
            ),
            packing=_packing(lengths, self.seq_length, seed),
            length_quantiles={
                f"{share:g}": int(n) for share, n in zip(_QUANTILES, quantiles, strict=True)
            },
            lengths=bins.histogram(),
            lengths_too_long=self.too_long.histogram(),
            counted_share=self.counted_share.histogram(),
            reasoning_answer=self.reasoning_answer.histogram2(),
            not_written=dict(self.not_written),
            spelled=dict(self.spelled),
            files=tuple(files),
            ignored_files=tuple(ignored),
            seconds=round(seconds, 3),
        )


def _packing(lengths: npt.NDArray[np.int32], row_length: int, seed: int) -> Packing:
    packs = pack(lengths, row_length=row_length, seed=seed)
    filled = np.add.reduceat(lengths[packs.documents], packs.bounds[:-1]) / row_length
    bins = _Bins(_SHARE_EDGES)
    bins.add(filled)
    return Packing(
        row_length=row_length,
        rows=len(packs),
        fill=fill(packs, lengths, row_length=row_length),
        fill_of_rows=bins.histogram(),
    )


class _Bins:
    """Counts of values, or of pairs of values, by bin."""

    def __init__(self, *edges: npt.NDArray[np.float64]) -> None:
        self.edges = edges
        self.counts = np.zeros([len(axis) for axis in edges], np.int64)

    def add(self, *values: Sequence[int] | npt.NDArray[np.number]) -> None:
        """What lies below the first edge goes into the first bin."""
        where = [
            np.maximum(np.searchsorted(axis, column, side="right") - 1, 0)
            for axis, column in zip(self.edges, values, strict=True)
        ]
        np.add.at(self.counts, tuple(where), 1)

    def histogram(self) -> Histogram:
        return Histogram(tuple(self.edges[0].tolist()), tuple(self.counts.tolist()))

    def histogram2(self) -> Histogram2:
        return Histogram2(tuple(self.edges[0].tolist()), tuple(map(tuple, self.counts.tolist())))
