"""Conversations to token ids and a loss mask, with DeepSeek's chat templates.

    messages --parse_conversation--> turns --render--> spans --tokenize--> Encoded

A span is a special token or a piece of text, and knows whether it counts for the loss: the mask is
fixed before there are any tokens. Special tokens go in by id; text between two of them is tokenised
in one piece, as the reference does, and can never become a special token itself.

What a template doesn't write (reasoning of earlier turns, say) is listed in `Encoded.dropped`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_dsv3.data.messages import Conversation, Message, parse_conversation
from megatron_dsv3.data.templates import TEMPLATES, ChatTemplate, Pieces, Special

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HistoryReasoning = Literal["strip", "keep"]
Ids = npt.NDArray[np.int32]

_CHARACTERS_PER_CALL = 1 << 22


class Span(NamedTuple):
    """A special token or a piece of text without any."""

    piece: Special | str
    counted: bool


@dataclass(frozen=True, slots=True)
class Dropped:
    """Something a conversation holds that its tokens don't."""

    turn: int
    part: str
    """`reasoning` or `content`."""
    reason: str
    counted: bool
    """Whether the turn counts for the loss, so that something to learn was lost."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as its template writes it; no two texts are neighbours."""

    spans: tuple[Span, ...]
    dropped: tuple[Dropped, ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """tokens: [n], int32; loss: [n], bool, True where that token itself is a counted target."""

    tokens: Ids
    loss: npt.NDArray[np.bool_]
    dropped: tuple[Dropped, ...] = ()


def encode(
    messages: object,
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    *,
    history_reasoning: HistoryReasoning = "strip",
) -> Encoded:
    """One row's `messages` as tokens and mask; for many, `render` each and `tokenize` them all."""
    rendered = render(parse_conversation(messages), template, history_reasoning=history_reasoning)
    return tokenize([rendered], tokenizer)[0]


def render(
    conversation: Conversation,
    template: ChatTemplate,
    *,
    history_reasoning: HistoryReasoning = "strip",
) -> Rendered:
    """The spans of a conversation. `strip` leaves only the last assistant turn's reasoning."""
    dropped: list[Dropped] = []
    if history_reasoning == "strip":
        conversation, dropped = _strip_history(conversation)
    system = "\n\n".join(turn.content for turn in conversation if turn.role == "system")
    writer = _Writer(template, dropped)
    writer.write((Special.BOS, "{content}"), counted=False, content=system)
    for i, turn in enumerate(conversation):
        if turn.role != "system":
            writer.write_turn(i, turn)
    return writer.finish()


def _strip_history(conversation: Conversation) -> tuple[Conversation, list[Dropped]]:
    last = max(i for i, turn in enumerate(conversation) if turn.role == "assistant")
    dropped = [
        Dropped(i, "reasoning", "earlier turns' reasoning is stripped, as when served", turn.loss)
        for i, turn in enumerate(conversation[:last])
        if turn.reasoning is not None
    ]
    history = (replace(turn, reasoning=None) for turn in conversation[:last])
    return (*history, *conversation[last:]), dropped


class _Writer:
    """Writes one conversation's turns in order; knows what stands before the next."""

    def __init__(self, template: ChatTemplate, dropped: list[Dropped]) -> None:
        self.template = template
        self.spans: list[Span] = []
        self.dropped = dropped
        self.previous: str | None = None
        self.in_outputs = False
        self.calls_opened = False
        self.outputs_opened = False

    def write(self, pieces: Pieces, *, counted: bool, **texts: str) -> None:
        for piece in pieces:
            if isinstance(piece, Special):
                self.spans.append(Span(piece, counted))
            elif text := piece.format_map(texts):
                self._write_text(text, counted=counted)

    def _write_text(self, text: str, *, counted: bool) -> None:
        # One piece up to the next special token, since a merge may cross the seam. A token that
        # holds something not to be learned doesn't count.
        before = self.spans[-1] if self.spans else None
        if before is not None and isinstance(before.piece, str):
            self.spans[-1] = Span(before.piece + text, before.counted and counted)
        else:
            self.spans.append(Span(text, counted))

    def write_turn(self, i: int, turn: Message) -> None:
        if turn.role == "user":
            self.write((Special.USER, "{content}"), counted=False, content=turn.content)
            self.in_outputs = False
        elif turn.role == "tool":
            self._write_output(turn)
        elif turn.tool_calls and self.calls_opened and not self.template.every_round:
            self._write_later_calls(i, turn)
        else:
            self._write_assistant(i, turn)
        self.previous = turn.role

    def finish(self) -> Rendered:
        if self.in_outputs:
            self.write(self.template.outputs_end, counted=False)
        return Rendered(tuple(self.spans), tuple(self.dropped))

    def _write_output(self, turn: Message) -> None:
        template = self.template
        before = template.output_separator if self.outputs_opened else template.outputs
        self.write((*before, *template.output), counted=False, content=turn.content)
        self.in_outputs = self.outputs_opened = True

    def _write_assistant(self, i: int, turn: Message) -> None:
        template = self.template
        if template.every_round:
            prompted = self.previous == "user"
            closes_outputs = self.in_outputs
            self.outputs_opened &= not turn.tool_calls
        else:
            prompted = bool(turn.tool_calls) or not self.in_outputs
            closes_outputs = self.in_outputs and not turn.tool_calls
        if not prompted and self.previous is None:
            raise ValueError(f"messages[{i}]: {template.name} needs a user turn before this one")
        if closes_outputs:
            self.write(template.outputs_end, counted=False)
        self.in_outputs = False
        self._write_start(i, turn, prompted=prompted)
        self.write(("{content}",), counted=turn.loss, content=turn.content)
        if turn.tool_calls:
            self.write(template.calls, counted=turn.loss)
            self._write_calls(turn)
            self.calls_opened = True
        self.write((Special.EOS,), counted=turn.loss)

    def _write_start(self, i: int, turn: Message, *, prompted: bool) -> None:
        template, reasoning = self.template, self.template.reasoning
        if turn.reasoning is None:
            self.write(template.prompt if prompted else (), counted=False)
            return
        if reasoning is None:
            known = ", ".join(t.name for t in TEMPLATES.values() if t.reasoning)
            raise ValueError(
                f"messages[{i}]: {template.name} has no reasoning; use one of {known}, or remove it"
            )
        chooses_mode = reasoning.prompt != template.prompt
        if (turn.tool_calls and not reasoning.with_calls) or (chooses_mode and not prompted):
            raise ValueError(
                f"messages[{i}]: {template.name} has reasoning only where a turn answers the user "
                "and calls no tools; remove it here, or strip earlier turns' reasoning"
            )
        self.write(reasoning.prompt if prompted else (), counted=False)
        thought = (*reasoning.open, "{reasoning}", *reasoning.close)
        self.write(thought, counted=turn.loss, reasoning=turn.reasoning)

    def _write_calls(self, turn: Message) -> None:
        for k, call in enumerate(turn.tool_calls):
            before = self.template.call_separator if k else ()
            texts = {"type": call.type, "name": call.name, "arguments": call.arguments}
            self.write((*before, *self.template.call), counted=turn.loss, **texts)
        self.write(self.template.calls_end, counted=turn.loss)

    def _write_later_calls(self, i: int, turn: Message) -> None:
        if turn.reasoning is not None:
            raise ValueError(
                f"messages[{i}]: {self.template.name} has no place for reasoning in a later round "
                "of tool calls; remove it here, or strip earlier turns' reasoning"
            )
        if turn.content:
            reason = f"{self.template.name} writes no text beside a later round of tool calls"
            self.dropped.append(Dropped(i, "content", reason, turn.loss))
        self.write(self.template.call_separator, counted=turn.loss)
        self._write_calls(turn)
        self.write((Special.EOS,), counted=turn.loss)
        self.in_outputs = False


def tokenize(rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    """Token ids and masks of many conversations; the tokenizer works with all its threads."""
    added = tokenizer.get_added_vocab()
    written = [span.piece for one in rendered for span in one.spans]
    specials = {piece for piece in written if isinstance(piece, Special)}
    special_ids = {special: _special_id(special, tokenizer, added) for special in specials}
    texts = [piece for piece in written if isinstance(piece, str)]
    text_ids = _encode_texts(texts, tokenizer.backend_tokenizer, list(added.values()))
    encoded = []
    for one in rendered:
        ids = [next(text_ids) if isinstance(p, str) else special_ids[p] for p, _ in one.spans]
        loss = np.repeat([span.counted for span in one.spans], [len(piece) for piece in ids])
        encoded.append(Encoded(np.concatenate(ids), loss, one.dropped))
    return encoded


def _special_id(
    special: Special, tokenizer: PreTrainedTokenizerFast, added: Mapping[str, int]
) -> Ids:
    named = special in (Special.BOS, Special.EOS)
    text = getattr(tokenizer, special.value) if named else special.value
    if text not in added:
        raise ValueError(
            f"{tokenizer.name_or_path}: no special token {text or special.value} in the tokenizer, "
            "but the template writes it; choose the template that belongs to this model"
        )
    return np.array([added[text]], np.int32)


def _encode_texts(texts: Sequence[str], backend: Any, added_ids: list[int]) -> Iterator[Ids]:
    # A tokenizer.json may carry both, and other users of this object may have switched them on.
    backend.no_truncation()
    backend.no_padding()
    is_added = np.zeros(max(backend.get_vocab_size(), *added_ids) + 1, np.bool_)
    is_added[added_ids] = True
    for chunk in _chunks(texts):
        encodings = backend.encode_batch_fast(chunk, add_special_tokens=False)
        for text, encoding in zip(chunk, encodings, strict=True):
            ids = np.array(encoding.ids, np.int32)
            yield _encode_plain(text, backend) if is_added[ids].any() else ids


def _chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts by the call: enough for many threads, few enough that their encodings fit memory."""
    chunk: list[str] = []
    num_characters = 0
    for text in texts:
        chunk.append(text)
        num_characters += len(text)
        if num_characters >= _CHARACTERS_PER_CALL:
            yield chunk
            chunk, num_characters = [], 0
    yield chunk


def _encode_plain(text: str, backend: Any) -> Ids:
    """As the tokenizer does, but blind to special tokens. Slow, and rare."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    words = backend.pre_tokenizer.pre_tokenize_str(text)
    ids = [token.id for word, _ in words for token in backend.model.tokenize(word)]
    return np.array(ids, np.int32)


def load_tokenizer(hf_dir: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hugging Face directory; its own Python code is never run."""
    # transformers takes seconds to import, and most of what imports this file only needs records.
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (hf_dir / name).is_file():
            raise FileNotFoundError(
                f"{hf_dir / name}: not found; expected the tokenizer files of a Hugging Face model"
            )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            hf_dir, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # whatever transformers and tokenizers raise on a broken file
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{hf_dir}: the tokenizer does not load: {reason}") from error
    for name in (Special.BOS.value, Special.EOS.value):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"{hf_dir / 'tokenizer_config.json'}: {name} is missing")
    return tokenizer
