"""What a user writes as `messages`, checked and read into records.

A fault is a `ValueError` that names the turn and the key, counted from 0 as in the file:
`messages[2].content: expected a string, got null`. The caller puts file and row before it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_dsv3.data.rows import kind_of, names_of, shown

_SHARED_KEYS = ("role", "content", "name", "loss")
_KEYS: dict[str, tuple[str, ...]] = {
    "system": _SHARED_KEYS,
    "developer": _SHARED_KEYS,
    "user": _SHARED_KEYS,
    "assistant": (*_SHARED_KEYS, "reasoning_content", "tool_calls"),
    "tool": (*_SHARED_KEYS, "tool_call_id"),
}

# At most the line breaks that R1's own format puts around the two parts are taken off, so that
# text copied from R1's raw output renders to itself.
_LEADING_THINK = re.compile(r"\s*<think>\n?(.*?)\n?</think>\n{0,2}(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of an assistant's turn; `arguments` is JSON text."""

    type: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; only an assistant's has `reasoning`, `tool_calls` or a true `loss`."""

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    loss: bool = False
    name: str = ""
    """Of who speaks; no template writes it."""


Conversation = tuple[Message, ...]


def parse_conversation(messages: object, *, key: str = "messages") -> Conversation:
    """Check one row's `messages` and read them into records; a fault names its turn, from 0.

    `key` is what the turns are called where they come from.
    """
    if not isinstance(messages, list | tuple):
        raise ValueError(f"{key}: expected a list of turns, got {kind_of(messages)}")
    if not messages:
        raise ValueError(f"{key}: empty conversation; expected at least one assistant turn")
    conversation = tuple(_parse_message(m, f"{key}[{i}]") for i, m in enumerate(messages))
    if not any(message.role == "assistant" for message in conversation):
        roles = names_of(message.role for message in conversation)
        raise ValueError(f"{key}: no assistant turn to learn from, got only {roles}")
    return conversation


def expand_turns(conversation: Conversation) -> Iterator[Conversation]:
    """One conversation for each counted turn: it ends with that turn, and nothing else counts.

    With earlier reasoning stripped, every turn then trains on what it will see when served.
    """
    silent = [replace(message, loss=False) for message in conversation]
    return ((*silent[:i], turn) for i, turn in enumerate(conversation) if turn.loss)


def _parse_message(message: object, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(
            f"{where}: expected an object with role and content, got {kind_of(message)}"
        )
    role = message.get("role")
    if not isinstance(role, str) or role not in _KEYS:
        raise ValueError(f"{where}.role: expected one of {', '.join(_KEYS)}, got {shown(role)}")
    _check_keys(message, role, where)
    loss = _parse_loss(message.get("loss"), role, where)
    # A tool's is that of the function, which the call says.
    given = message.get("name") if role != "tool" else None
    name = _parse_text(given or "", f"{where}.name")
    if role != "assistant":
        content = _parse_content(message.get("content"), f"{where}.content")
        return Message("system" if role == "developer" else role, content, loss=loss, name=name)
    return _parse_assistant(message, where, loss=loss, name=name)


def _parse_assistant(message: Mapping[str, Any], where: str, *, loss: bool, name: str) -> Message:
    tool_calls = _parse_tool_calls(message.get("tool_calls"), f"{where}.tool_calls")
    content = message.get("content")
    # OpenAI's API leaves the content null where the turn is only calls.
    text = "" if content is None and tool_calls else _parse_content(content, f"{where}.content")
    # An empty string is how many exports write "no reasoning"; <think></think> says it is empty.
    given = message.get("reasoning_content") or None
    reasoning = None if given is None else _parse_text(given, f"{where}.reasoning_content")
    if text.lstrip().startswith("<think>"):
        match = _LEADING_THINK.fullmatch(text)
        if match is None:
            raise ValueError(f"{where}.content: <think> has no </think>; is the turn cut off?")
        if reasoning is not None:
            raise ValueError(
                f"{where}: both reasoning_content and a leading <think> in content; keep one"
            )
        reasoning, text = match.groups()
    return Message("assistant", text, reasoning, tool_calls, loss, name)


def _check_keys(message: Mapping[str, Any], role: str, where: str) -> None:
    # Tables (Parquet, exports of an API) give every turn every key, most of them empty.
    unknown = [
        k for k, v in message.items() if k not in _KEYS[role] and v not in (None, "", [], {})
    ]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), _KEYS[role], n=1)
        hint = f"did you mean {shown(near[0])}?" if near else f"expected {', '.join(_KEYS[role])}"
        raise ValueError(f"{where}: unknown key {shown(unknown[0])} in a turn of {role}; {hint}")


def _parse_loss(loss: object, role: str, where: str) -> bool:
    if loss is None:
        return role == "assistant"
    if not isinstance(loss, bool):
        raise ValueError(f"{where}.loss: expected true or false, got {shown(loss)}")
    if loss and role != "assistant":
        raise ValueError(f"{where}.loss: only assistant turns are learned, got true for {role}")
    return loss


def _parse_content(content: object, where: str) -> str:
    if not isinstance(content, list):
        return _parse_text(content, where)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
            raise ValueError(f"{where}[{i}]: expected a part of type 'text', got {shown(kind)}")
        texts.append(_parse_text(part.get("text"), f"{where}[{i}].text"))
    # As vLLM joins the parts of a request, so that training sees what serving will.
    return "\n".join(texts)


def _parse_text(text: object, where: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where}: expected a string, got {kind_of(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"{where}: half of a surrogate pair (U+{code:04X}) at character {error.start}, "
            "which is not text; was an escape sequence cut?"
        ) from None
    return text


def _parse_tool_calls(calls: object, where: str) -> tuple[ToolCall, ...]:
    if calls is None:
        return ()
    if not isinstance(calls, list):
        raise ValueError(f"{where}: expected a list of calls, got {kind_of(calls)}")
    return tuple(_parse_tool_call(call, f"{where}[{i}]") for i, call in enumerate(calls))


def _parse_tool_call(call: object, where: str) -> ToolCall:
    if not isinstance(call, Mapping):
        raise ValueError(f"{where}: expected an object with 'function', got {kind_of(call)}")
    function = call.get("function")
    if not isinstance(function, Mapping):
        keys = names_of(call)
        raise ValueError(f"{where}: expected an object with 'function', got the keys {keys}")
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = _as_json(arguments, f"{where}.function.arguments")
    return ToolCall(
        type=_parse_text(call.get("type", "function"), f"{where}.type"),
        name=_parse_text(function.get("name"), f"{where}.function.name"),
        arguments=_parse_text(arguments, f"{where}.function.arguments"),
    )


def _as_json(value: Mapping[str, Any], where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        # Python reads NaN, and nesting somewhat deeper than it writes; tables hold bytes and times.
        raise ValueError(f"{where}: expected what JSON can hold, got {error}") from None
