"""Conversations as DeepSeek's chat templates write them, with what counts for the loss.

    messages --parse_conversation--> turns --render--> spans --tokenize--> Encoded

A span is a special token or a piece of text, and knows whether it counts for the loss: the mask is
fixed before there are any tokens. What a template doesn't write (reasoning of earlier turns, say)
is listed in `Rendered.dropped`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from megatron_dsv3.data.messages import Conversation, Message
from megatron_dsv3.data.templates import TEMPLATES, ChatTemplate, Pieces, Special

HistoryReasoning = Literal["strip", "keep"]


class Span(NamedTuple):
    """A special token (by its role or its id), or a piece of text without any."""

    piece: Special | int | str
    counted: bool
    stretches: tuple[tuple[int, int], ...] = ()
    """Where only parts of a text count: start and end of each, in characters; then `counted` is
    false."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """Something a conversation holds that its tokens don't."""

    turn: int
    part: str
    """`reasoning`, `content` or `name`."""
    reason: str
    counted: bool
    """Whether the turn counts for the loss, so that something to learn was lost."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as its template writes it; no two texts are neighbours."""

    spans: tuple[Span, ...]
    dropped: tuple[Dropped, ...]


def render(
    conversation: Conversation,
    template: ChatTemplate,
    *,
    history_reasoning: HistoryReasoning = "strip",
) -> Rendered:
    """The spans of a conversation. `strip` leaves only the last assistant turn's reasoning."""
    dropped = unwritten_names(conversation)
    if history_reasoning == "strip":
        conversation, stripped = strip_history(conversation)
        dropped += stripped
    system = "\n\n".join(turn.content for turn in conversation if turn.role == "system")
    writer = _Writer(template, dropped)
    writer.write((Special.BOS, "{content}"), counted=False, content=system)
    for i, turn in enumerate(conversation):
        if turn.role != "system":
            writer.write_turn(i, turn)
    return writer.finish()


def unwritten_names(conversation: Conversation) -> list[Dropped]:
    """Who speaks, beyond the role, is in no template."""
    named = (i for i, turn in enumerate(conversation) if turn.name)
    return [Dropped(i, "name", "the template writes roles alone", counted=False) for i in named]


def strip_history(conversation: Conversation) -> tuple[Conversation, list[Dropped]]:
    """Without the reasoning of all assistant turns but the last, and what that leaves out."""
    last = max(i for i, turn in enumerate(conversation) if turn.role == "assistant")
    dropped = [
        Dropped(i, "reasoning", "earlier turns' reasoning is stripped, as when served", turn.loss)
        for i, turn in enumerate(conversation[:last])
        if turn.reasoning is not None
    ]
    history = (
        turn if turn.reasoning is None else replace(turn, reasoning=None)
        for turn in conversation[:last]
    )
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
        # One piece up to the next special token, since a merge may cross the seam.
        before = self.spans[-1] if self.spans else None
        if before is not None and isinstance(before.piece, str):
            self.spans[-1] = _joined(before, before.piece, text, counted=counted)
        else:
            self.spans.append(Span(text, counted))

    def write_turn(self, i: int, turn: Message) -> None:
        if turn.role == "user":
            self.write((Special.USER, "{content}"), counted=False, content=turn.content)
            if self.template.prompt_follows_user:
                self.write(self.template.prompt, counted=False)
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
            prompted = self.previous == "user" and not template.prompt_follows_user
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


def _joined(before: Span, start: str, text: str, *, counted: bool) -> Span:
    if before.counted == counted and not before.stretches:
        return Span(start + text, counted)
    stretches = ((0, len(start)),) if before.counted else before.stretches
    if counted:
        stretches = (*stretches, (len(start), len(start) + len(text)))
    return Span(start + text, False, stretches)
