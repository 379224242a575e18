"""Samples from chat files, the order they are trained in, and a position to resume from.

Order and position know nothing of data parallelism: a position counts the samples that all ranks
together have consumed, so a run may go on with another number of ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_dsv3.data.chat import HistoryReasoning, Rendered, render
from megatron_dsv3.data.messages import Conversation, expand_turns
from megatron_dsv3.data.rows import Row
from megatron_dsv3.data.schemas import read_chat
from megatron_dsv3.data.sources import read_rows
from megatron_dsv3.data.store import Sample
from megatron_dsv3.data.templates import ChatTemplate
from megatron_dsv3.data.tokens import Encoded, Vocabulary, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TooLong = Literal["drop", "truncate", "error"]

# Enough to keep all of the tokenizer's threads busy.
_ROWS_PER_CALL = 512
_NUM_LONGEST = 10


EMPTY_SAMPLE = Sample("", np.zeros(0, np.int32), np.zeros(0, np.bool_))
"""Fills the last global batch of a run: no tokens, so no loss."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What came of the rows; every sample is kept or in one of the counts beside it."""

    rows: int
    samples: int
    """Kept, truncated ones among them."""
    too_long: int
    """Dropped for their length."""
    truncated: int
    without_counted: int
    """Dropped because truncation left no counted token."""
    tokens: int
    """In the samples kept, as are `counted_tokens`."""
    counted_tokens: int
    lost_tokens: int
    """In samples dropped, and behind the end of truncated ones."""
    longest: tuple[tuple[str, int], ...]
    """Id and tokens of the longest samples that did not fit, longest first."""
    not_written: Mapping[str, int]
    """Turns with something that the template doesn't write, by what and why."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples in the order of their files, and the account of how they came about."""

    samples: list[Sample]
    report: LoadReport


def load_samples(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    *,
    seq_length: int,
    too_long: TooLong = "drop",
    history_reasoning: HistoryReasoning | Literal["expand"] = "strip",
) -> Samples:
    """Read, render and tokenise files into memory.

    Args:
        seq_length: most tokens of a sample.
        too_long: what becomes of a longer one; each is counted.
        history_reasoning: `expand` makes one sample of every counted turn.
    """
    sink = _Sink(seq_length, too_long)
    rows = (row for path in paths for row in read_rows(path))
    for chunk in batched(rows, _ROWS_PER_CALL):
        rendered = [
            (name, one)
            for row in chunk
            for name, one in _render_row(row, template, history_reasoning)
        ]
        encoded = tokenize([one for _, one in rendered], Vocabulary.of(tokenizer))
        sink.num_rows += len(chunk)
        for (name, _), one in zip(rendered, encoded, strict=True):
            sink.add(name, one)
    return sink.finish()


def _render_row(
    row: Row, template: ChatTemplate, history_reasoning: HistoryReasoning | Literal["expand"]
) -> Iterable[tuple[str, Rendered]]:
    try:
        conversation = read_chat(row.value).conversation
        _check_counted(conversation)
        if history_reasoning != "expand":
            one = render(conversation, template, history_reasoning=history_reasoning)
            return [(row.source, one)]
        return [
            (f"{row.source}#{len(turns) - 1}", render(turns, template))
            for turns in expand_turns(conversation)
        ]
    except ValueError as error:
        raise ValueError(f"{row.source}: {error}") from None


def _check_counted(conversation: Conversation) -> None:
    num_turns = sum(turn.role == "assistant" for turn in conversation)
    if not any(turn.loss for turn in conversation):
        raise ValueError(
            f"no counted token: loss is false on all {num_turns} assistant turns; "
            "set it true on one, or leave the row out"
        )


class _Sink:
    """Takes samples in, or counts why not."""

    def __init__(self, seq_length: int, too_long: TooLong) -> None:
        if too_long not in (known := ("drop", "truncate", "error")):
            raise ValueError(f"too_long: expected one of {', '.join(known)}, got {too_long!r}")
        self.seq_length = seq_length
        self.too_long = too_long
        self.num_rows = 0
        self.samples: list[Sample] = []
        self.num_by_fate: Counter[str] = Counter()
        self.num_lost = 0
        self.not_written: Counter[str] = Counter()
        self.longest: list[tuple[str, int]] = []

    def add(self, name: str, encoded: Encoded) -> None:
        for part in encoded.dropped:
            learned = "counted" if part.counted else "not counted"
            self.not_written[f"{part.part} ({learned}): {part.reason}"] += 1
        if len(encoded.tokens) > self.seq_length:
            self._add_too_long(name, encoded)
        else:
            self.samples.append(Sample(name, encoded.tokens, encoded.loss))

    def _add_too_long(self, name: str, encoded: Encoded) -> None:
        num_tokens = len(encoded.tokens)
        if self.too_long == "error":
            raise ValueError(
                f"{name}: {num_tokens} tokens, but the sequence length is {self.seq_length}; "
                "raise it, or drop or truncate such samples"
            )
        longest = sorted([*self.longest, (name, num_tokens)], key=lambda x: -x[1])
        self.longest = longest[:_NUM_LONGEST]
        fate: str = self.too_long
        if fate == "truncate" and encoded.loss[: self.seq_length].any():
            # Copies: a view would keep the whole sample in memory.
            tokens = encoded.tokens[: self.seq_length].copy()
            self.samples.append(Sample(name, tokens, encoded.loss[: self.seq_length].copy()))
            num_tokens -= self.seq_length
        elif fate == "truncate":
            fate = "without_counted"
        self.num_by_fate[fate] += 1
        self.num_lost += num_tokens

    def finish(self) -> Samples:
        fates = self.num_by_fate
        if not self.samples:
            raise ValueError(
                f"no sample left of {self.num_rows} rows: {fates['drop']} longer than "
                f"{self.seq_length} tokens, {fates['without_counted']} with no counted token in "
                "those; raise the sequence length"
            )
        report = LoadReport(
            rows=self.num_rows,
            samples=len(self.samples),
            too_long=fates["drop"],
            truncated=fates["truncate"],
            without_counted=fates["without_counted"],
            tokens=sum(len(sample.tokens) for sample in self.samples),
            counted_tokens=sum(int(sample.loss.sum()) for sample in self.samples),
            lost_tokens=self.num_lost,
            longest=tuple(self.longest),
            not_written=dict(self.not_written),
        )
        return Samples(self.samples, report)


# ---- Order --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Position:
    """How far a run is: `sample` samples of epoch `epoch` are consumed, over all ranks."""

    epoch: int = 0
    sample: int = 0


class GlobalBatch(NamedTuple):
    """The samples of one optimizer step, and the position after it."""

    after: Position
    samples: list[Sample]


def sample_order(num_samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The permutation of one epoch: [num_samples], indices.

    Sorts Philox's raw output, keyed by seed and epoch: numpy promises that stream for good, which
    it doesn't for `Generator.permutation`, and a run may be resumed under another numpy.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected 0 to 2**64 - 1, got {seed}")
    philox = np.random.Philox(key=np.array([seed, epoch], np.uint64))
    return np.argsort(philox.random_raw(num_samples), kind="stable")


def global_batches(
    samples: Sequence[Sample],
    *,
    global_batch_size: int,
    seed: int,
    position: Position = Position(),
    num_epochs: int | None = None,
) -> Iterator[GlobalBatch]:
    """Global batches from a position on; endless without `num_epochs`.

    A batch that an epoch can't fill goes on with the next epoch's samples, so steps are of equal
    size and none is lost. At the end of the run there is no next epoch: empty samples fill the
    last batch, and every sample has been seen exactly `num_epochs` times.
    """
    if not 0 <= position.sample < len(samples):
        raise ValueError(
            f"position: sample {position.sample} of an epoch of {len(samples)}; "
            "are these the data that the run began with?"
        )
    batch: list[Sample] = []
    epoch, start = position.epoch, position.sample
    while num_epochs is None or epoch < num_epochs:
        order = sample_order(len(samples), seed, epoch)
        for consumed in range(start, len(samples)):
            batch.append(samples[order[consumed]])
            if len(batch) == global_batch_size:
                yield GlobalBatch(_position(epoch, consumed + 1, len(samples)), batch)
                batch = []
        epoch, start = epoch + 1, 0
    if batch:
        batch += [EMPTY_SAMPLE] * (global_batch_size - len(batch))
        yield GlobalBatch(Position(epoch, 0), batch)


def _position(epoch: int, consumed: int, num_samples: int) -> Position:
    return Position(epoch + consumed // num_samples, consumed % num_samples)


def rank_micro_batches(
    samples: Sequence[Sample], *, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[list[Sample]]:
    """One rank's micro-batches of a global batch.

    The global batch is cut into micro-batches in order, and dealt out like cards: micro-batch k
    goes to rank k % dp_size. The micro-batches are then the same at every data-parallel size.
    """
    if len(samples) % (micro_batch_size * dp_size):
        raise ValueError(
            f"global_batch_size ({len(samples)}) must be a multiple of micro_batch_size "
            f"({micro_batch_size}) * dp ({dp_size}) = {micro_batch_size * dp_size}"
        )
    micro_batches = [list(batch) for batch in batched(samples, micro_batch_size)]
    return micro_batches[dp_rank::dp_size]
