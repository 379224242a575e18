"""The chat template that a tokenizer carries (Jinja), rendered with what counts for the loss.

A turn's own part is what rendering the conversation up to it adds to the prompt that serving would
show: two renderings, one the beginning of the other, so nothing is searched for in the text. Where
a message spells a special token, private-use characters take its place until the template is done.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from megatron_dsv3.data.chat import (
    Dropped,
    HistoryReasoning,
    Rendered,
    Span,
    strip_history,
    unwritten_names,
)
from megatron_dsv3.data.messages import Conversation, Message
from megatron_dsv3.data.templates import ChatTemplate, find_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OWN = "tokenizer"
"""The name by which a tokenizer's own template is chosen."""

_PRIVATE_USE = range(0xF0000, 0xFFFFE)


@dataclass(frozen=True)
class OwnTemplate:
    """A Jinja template and the tokens it can write."""

    text: str
    variables: Mapping[str, str]
    """The special tokens under the names that templates know them by."""
    added: Mapping[str, int]
    name: str = OWN

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> OwnTemplate:
        """That of a loaded tokenizer.

        Raises:
            ValueError: It has none, or tokens whose place in a text depends on their neighbours.
        """
        text = tokenizer.chat_template
        if isinstance(text, dict):
            text = text.get("default")
        if not text:
            raise ValueError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template; choose a built-in"
            )
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
        if odd := [token.content for token in added if token.lstrip or token.rstrip]:
            raise ValueError(
                f"{tokenizer.name_or_path}: the token {odd[0]} swallows spaces beside it, which "
                "template: tokenizer cannot follow; choose a built-in"
            )
        variables = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
        return cls(text, variables, tokenizer.get_added_vocab())

    def render(
        self, conversation: Conversation, *, history_reasoning: HistoryReasoning = "strip"
    ) -> Rendered:
        """The spans of a conversation, as `chat.render` gives them for a built-in template.

        Raises:
            ValueError: The template refuses it, or writes a turn otherwise than serving would.
        """
        dropped = unwritten_names(conversation)
        if history_reasoning == "strip":
            conversation, stripped = strip_history(conversation)
            dropped += stripped
        guards = _Guards.of(self._tokens, conversation)
        messages = [_as_dict(turn, guards) for turn in conversation]
        whole = self._write(messages)
        stretches = []
        for i, turn in enumerate(conversation):
            if turn.role != "assistant":
                continue
            start, end = self._own_part(i, messages, whole)
            dropped += _left_out(i, turn, messages[i], whole[start:end])
            if turn.loss:
                stretches.append((start, self._last_token(whole, start, end)))
        for i, turn in enumerate(conversation):
            if turn.role != "assistant":
                dropped += _left_out(i, turn, messages[i], whole)
        return Rendered(tuple(self._spans(whole, stretches, guards)), tuple(dropped))

    @cached_property
    def _tokens(self) -> re.Pattern[str]:
        longest_first = sorted(self.added, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)))

    def _write(self, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        # Of transformers only this part is light: the package as a whole takes seconds and 500 MB.
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            [text], _ = render_jinja_template(
                [messages],
                chat_template=self.text,
                add_generation_prompt=prompt,
                **self.variables,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the tokenizer's chat template refuses it: {error}") from None
        return str(text)

    def _own_part(self, i: int, messages: list[dict[str, Any]], whole: str) -> tuple[int, int]:
        given = self._write(messages[:i], prompt=True)
        upto = self._write(messages[: i + 1]) if i + 1 < len(messages) else whole
        if not whole.startswith(upto):
            raise ValueError(
                f"messages[{i}]: the tokenizer's chat template writes this turn otherwise once "
                "others follow it; use --history-reasoning expand, or a built-in template"
            )
        if upto.startswith(given):
            return len(given), len(upto)
        # Serving would show another prompt here. What both have in common is the prompt for sure,
        # so long as it holds all text of earlier turns: then only tokens are left out.
        start = _common_length(given, upto)
        inside = [m.start() for m in self._tokens.finditer(given) if m.start() < start < m.end()]
        start = inside[0] if inside else start
        earlier = self._write(messages[:i]) if i else ""
        if self._tokens.sub("", earlier[start:]):
            raise ValueError(
                f"messages[{i}]: the tokenizer's chat template writes earlier turns otherwise once "
                "this one follows; use a built-in template"
            )
        if upto.startswith(self._prompt, start):
            start += len(self._prompt)
        return start, len(upto)

    @cached_property
    def _prompt(self) -> str:
        """What serving puts between a user's turn and the answer."""
        question = [{"role": "user", "content": ""}]
        without, with_prompt = self._write(question), self._write(question, prompt=True)
        return with_prompt.removeprefix(without) if with_prompt.startswith(without) else ""

    def _last_token(self, whole: str, start: int, end: int) -> int:
        """Without the line break that some templates write behind the turn's end token."""
        last = max((m.end() for m in self._tokens.finditer(whole, start, end)), default=end)
        return last if not whole[last:end].strip() else end

    def _spans(
        self, whole: str, stretches: list[tuple[int, int]], guards: _Guards
    ) -> Iterator[Span]:
        position = 0
        for match in self._tokens.finditer(whole):
            if match.start() > position:
                yield _text_span(whole, (position, match.start()), stretches, guards)
            counted = any(a <= match.start() and match.end() <= b for a, b in stretches)
            yield Span(self.added[match.group()], counted)
            position = match.end()
        if position < len(whole):
            yield _text_span(whole, (position, len(whole)), stretches, guards)


@dataclass(frozen=True, slots=True)
class _Guards:
    """One character for each special token that a conversation's text spells."""

    by_token: Mapping[str, str]

    @classmethod
    def of(cls, tokens: re.Pattern[str], conversation: Conversation) -> _Guards:
        texts = [text for turn in conversation for text in _texts(turn)]
        spelled = sorted({match for text in texts for match in tokens.findall(text)})
        taken = set("".join(texts)) if spelled else set()
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in taken)
        return cls(dict(zip(spelled, free, strict=False)))

    def put(self, text: str) -> str:
        for token, guard in sorted(self.by_token.items(), key=lambda pair: -len(pair[0])):
            text = text.replace(token, guard)
        return text

    def take_away(self, text: str) -> str:
        for token, guard in self.by_token.items():
            text = text.replace(guard, token)
        return text


def _texts(turn: Message) -> Iterator[str]:
    yield turn.content
    yield turn.reasoning or ""
    for call in turn.tool_calls:
        yield from (call.type, call.name, call.arguments)


def _as_dict(turn: Message, guards: _Guards) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": guards.put(turn.content)}
    if turn.reasoning is not None:
        message["reasoning_content"] = guards.put(turn.reasoning)
    if turn.tool_calls:
        message["tool_calls"] = [
            {
                "type": guards.put(call.type),
                "function": {
                    "name": guards.put(call.name),
                    "arguments": guards.put(call.arguments),
                },
            }
            for call in turn.tool_calls
        ]
    return message


def _text_span(
    whole: str, bounds: tuple[int, int], stretches: list[tuple[int, int]], guards: _Guards
) -> Span:
    start, end = bounds
    inside = [(max(a, start), min(b, end)) for a, b in stretches if a < end and b > start]
    text = guards.take_away(whole[start:end])
    if inside == [bounds]:
        return Span(text, True)

    def place(position: int) -> int:
        return len(guards.take_away(whole[start:position]))

    return Span(text, False, tuple((place(a), place(b)) for a, b in inside))


def _common_length(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def choose_template(name: str, tokenizer: PreTrainedTokenizerFast) -> ChatTemplate | OwnTemplate:
    """A built-in template by its name, or the tokenizer's own."""
    return OwnTemplate.of(tokenizer) if name == OWN else find_template(name)


def _left_out(i: int, turn: Message, message: Mapping[str, Any], written: str) -> Iterator[Dropped]:
    """What of a message the template did not write, up to spaces around it."""
    reason = "the tokenizer's chat template does not write it"
    texts = {"content": message["content"], "reasoning": message.get("reasoning_content", "")}
    for part, text in texts.items():
        if text.strip() not in written:
            yield Dropped(i, part, reason, turn.loss)
    for call in message.get("tool_calls", ()):
        function = call["function"]
        if function["name"] not in written or function["arguments"] not in written:
            raise ValueError(
                f"messages[{i}]: the tokenizer's chat template does not write the call "
                f"{json.dumps(function, ensure_ascii=False)[:80]} as it is; use a built-in template"
            )
