"""Items of input files to tokenised samples, with an account of all that did not become one.

This is what a worker does; it holds for one block of items and knows nothing of the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Literal, NamedTuple

import numpy.typing as npt

from megatron_dsv3.data.chat import HistoryReasoning, Rendered, render
from megatron_dsv3.data.messages import Conversation, expand_turns
from megatron_dsv3.data.own_template import OwnTemplate
from megatron_dsv3.data.rows import Fault, Item, Row, RowError, decode
from megatron_dsv3.data.schemas import read_chat
from megatron_dsv3.data.store import Spans, Tokens, spans_of
from megatron_dsv3.data.templates import ChatTemplate
from megatron_dsv3.data.tokens import Encoded, Text, Vocabulary, check_words, tokenize

_CHARACTERS_AT_A_TIME = 1 << 21

TooLong = Literal["drop", "truncate", "error"]
History = Literal["strip", "keep", "expand"]
OnBadRow = Literal["error", "skip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """What decides which samples a row gives."""

    seq_length: int
    """Most tokens of a sample."""
    too_long: TooLong = "drop"
    """What becomes of a longer one."""
    history_reasoning: History = "strip"
    """expand: one sample of every counted turn, reasoning before it stripped."""

    def __post_init__(self) -> None:
        if self.seq_length < 1:
            raise ValueError(f"seq_length: expected at least 1, got {self.seq_length}")
        for name, known in (
            ("too_long", ("drop", "truncate", "error")),
            ("history_reasoning", ("strip", "keep", "expand")),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


class Prepared(NamedTuple):
    """A sample as the store takes it."""

    id: str
    """`file:row`, and `#turn` where a row gives one sample a turn."""
    tokens: Tokens
    spans: Spans
    num_counted: int
    num_reasoning: int
    num_answer: int


@dataclass(slots=True)
class Block:
    """What came of some consecutive items."""

    samples: list[Prepared] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    """In the order of the rows."""
    num_rows: int = 0
    """Read, faulty ones among them."""
    num_kept: int = 0
    """Rows that gave a sample."""
    schemas: Counter[str] = field(default_factory=Counter)
    """Rows by schema."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Samples that were not kept, by reason."""
    num_truncated: int = 0
    lost_tokens: int = 0
    """In samples dropped for their length, and behind the end of truncated ones."""
    too_long: list[tuple[str, int]] = field(default_factory=list)
    """Id and tokens of the samples that did not fit."""
    not_written: Counter[str] = field(default_factory=Counter)
    """Turns with something that the template doesn't write, by what and why."""
    spelled: Counter[str] = field(default_factory=Counter)
    """Samples whose own words spell a special token, by that token."""


TOO_LONG = "longer than the sequence length"
NO_COUNTED = "no counted token"
NO_COUNTED_LEFT = "no counted token within the sequence length"


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Template, tokenizer and options: all that a worker needs."""

    vocabulary: Vocabulary
    template: ChatTemplate | OwnTemplate
    options: SampleOptions

    def run(self, items: Sequence[Item]) -> Block:
        """The samples of some items; a fault keeps no other row from being read."""
        block = Block()
        kept = set()
        texts: dict[str, Text] = {}
        for named in _some_at_a_time(self._rendered(items, block)):
            encoded = tokenize([rendered for _, _, rendered in named], self.vocabulary, texts)
            for (row, name, _), one in zip(named, encoded, strict=True):
                if self._add(name, one, block):
                    kept.add(row)
        block.num_kept = len(kept)
        return block

    def _rendered(self, items: Sequence[Item], block: Block) -> Iterator[tuple[int, str, Rendered]]:
        for row in (row for item in items for row in decode(item)):
            if isinstance(row, Fault):
                block.num_rows += not row.ends_file
                block.faults.append(row)
                continue
            block.num_rows += 1
            try:
                schema, conversation = read_chat(row.value)
                _check_counted(conversation)
                samples = self._samples(row, conversation)
            except RowError as error:
                block.faults.append(Fault(error.reason, f"{row.place}: {error}"))
                continue
            block.schemas[schema] += 1
            yield from ((block.num_rows, name, rendered) for name, rendered in samples)

    def _samples(self, row: Row, conversation: Conversation) -> Iterable[tuple[str, Rendered]]:
        """All samples of a row, once it is known that all can be written.

        An expanded row may be its length times its turns: only the first samples are kept from the
        check, the others are written again when they are asked for.
        """
        if self.options.history_reasoning != "expand":
            return [(row.source, self._write(conversation))]
        first: list[tuple[str, Rendered]] = []
        num_characters = 0
        for turns in expand_turns(conversation):
            rendered = self._write(turns)
            num_characters += _length(rendered)
            if num_characters <= _CHARACTERS_AT_A_TIME:
                first.append((_name(row, turns), rendered))
        others = islice(expand_turns(conversation), len(first), None)
        return chain(first, ((_name(row, turns), self._write(turns)) for turns in others))

    def _write(self, conversation: Conversation) -> Rendered:
        keep = self.options.history_reasoning == "keep"
        history: HistoryReasoning = "keep" if keep else "strip"
        try:
            if isinstance(self.template, OwnTemplate):
                rendered = self.template.render(conversation, history_reasoning=history)
            else:
                rendered = render(conversation, self.template, history_reasoning=history)
        except ValueError as error:
            raise RowError("the template cannot write it", str(error)) from None
        check_words(rendered, self.vocabulary)
        return rendered

    def _add(self, name: str, encoded: Encoded, block: Block) -> bool:
        for part in encoded.dropped:
            learned = "counted" if part.counted else "not counted"
            block.not_written[f"{part.part} ({learned}): {part.reason}"] += 1
        block.spelled.update(encoded.spelled)
        limit, num_tokens = self.options.seq_length, len(encoded.tokens)
        if num_tokens <= limit:
            kept = _keep(name, encoded, limit, block)
            block.dropped[NO_COUNTED] += not kept
            return kept
        block.too_long.append((name, num_tokens))
        if self.options.too_long == "error":
            block.faults.append(
                Fault(
                    TOO_LONG,
                    f"{name}: {num_tokens} tokens, but the sequence length is {limit}; "
                    "raise it, or drop or truncate such samples",
                )
            )
        elif self.options.too_long == "truncate" and _keep(name, encoded, limit, block):
            block.num_truncated += 1
            block.lost_tokens += num_tokens - limit
            return True
        else:
            truncate = self.options.too_long == "truncate"
            block.dropped[NO_COUNTED_LEFT if truncate else TOO_LONG] += 1
            block.lost_tokens += num_tokens
        return False


def _some_at_a_time[T: tuple[int, str, Rendered]](named: Iterable[T]) -> Iterator[list[T]]:
    """Enough for the tokenizer's threads; the many samples of an expanded row are not held all."""
    some: list[T] = []
    num_characters = 0
    for one in named:
        some.append(one)
        num_characters += _length(one[2])
        if num_characters >= _CHARACTERS_AT_A_TIME:
            yield some
            some, num_characters = [], 0
    if some:
        yield some


def _length(rendered: Rendered) -> int:
    return sum(len(s.piece) for s in rendered.spans if isinstance(s.piece, str))


def _name(row: Row, turns: Conversation) -> str:
    return f"{row.source}#{len(turns) - 1}"


def _check_counted(conversation: Conversation) -> None:
    if not any(turn.loss for turn in conversation):
        num_turns = sum(turn.role == "assistant" for turn in conversation)
        raise RowError(
            "nothing to learn",
            f"no counted token: loss is false on all {num_turns} assistant turns; "
            "set it true on one, or leave the row out",
        )


def _keep(name: str, encoded: Encoded, limit: int, block: Block) -> bool:
    loss: npt.NDArray[Any] = encoded.loss[:limit]
    num_counted = int(loss.sum())
    if not num_counted:
        return False
    fits = len(encoded.tokens) <= limit
    block.samples.append(
        Prepared(
            id=name,
            tokens=encoded.tokens[:limit],
            spans=spans_of(loss),
            num_counted=num_counted,
            # Of a truncated sample it isn't known how much of each is left.
            num_reasoning=encoded.num_reasoning if fits else 0,
            num_answer=encoded.num_answer if fits else 0,
        )
    )
    return True
