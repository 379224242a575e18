"""Rows to conversations: OpenAI's `messages`, or ShareGPT's `conversations`, told by their key.

A system prompt may stand beside the turns of either. ShareGPT names roles by `from` and holds text
in `value`, and a `function_call` is a turn of its own whose value is JSON. It is rewritten as
`messages`, so that there is one place where a conversation is checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_dsv3.data.messages import Conversation, Message, parse_conversation
from megatron_dsv3.data.rows import RowError, kind_of, names_of, shown, unique_keys

SCHEMAS = ("messages", "conversations")
ROW_KEYS = (*SCHEMAS, "system", "tools")
"""Keys of a row that mean something; all others are passed over."""

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


class Chat(NamedTuple):
    """One row, read."""

    schema: str
    conversation: Conversation


def read_chat(value: object) -> Chat:
    """A row's conversation, checked.

    Raises:
        RowError: What was expected and what is there; the caller puts the place before it.
    """
    if not isinstance(value, Mapping):
        raise RowError("not an object", f"expected an object with messages, got {kind_of(value)}")
    schema = _schema(value)
    try:
        _check_tools(value)
        turns = value[schema] if schema == "messages" else _as_messages(value[schema])
        return Chat(schema, (*_system(value), *parse_conversation(turns, key=schema)))
    except ValueError as error:
        raise RowError("bad conversation", str(error)) from None


def _schema(value: Mapping[str, Any]) -> str:
    # A table has every column in every row, some of them empty.
    found = [key for key in SCHEMAS if value.get(key) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        raise RowError("unknown schema", f"expected one of {' and '.join(SCHEMAS)}, got both")
    named = [key for key in SCHEMAS if key in value]
    if named:
        return named[0]
    expected = " or ".join(SCHEMAS)
    problem = f"expected an object with the key {expected}, got {names_of(value)}"
    raise RowError("unknown schema", problem)


def _check_tools(value: Mapping[str, Any]) -> None:
    if value.get("tools"):
        raise ValueError(
            "DeepSeek's templates write no tool definitions, so tools would be lost; "
            "put them into the system message"
        )


def _system(value: Mapping[str, Any]) -> Conversation:
    if not value.get("system"):
        return ()
    if not isinstance(value["system"], str):
        raise ValueError(f"system: expected a string, got {kind_of(value['system'])}")
    return (Message("system", value["system"]),)


def _as_messages(turns: object) -> object:
    if not isinstance(turns, list):
        return turns  # which parse_conversation refuses
    return [_as_message(turn, f"conversations[{i}]") for i, turn in enumerate(turns)]


def _as_message(turn: object, where: str) -> object:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where}: expected an object with from and value, got {kind_of(turn)}")
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise ValueError(f"{where}.from: expected one of {', '.join(_ROLES)}, got {shown(speaker)}")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if wrong := [key for key in ("role", "content") if rest.get(key) is not None]:
        raise ValueError(f"{where}: {wrong[0]} beside from and value; expected one way of writing")
    message = {**rest, "role": _ROLES[speaker], "content": turn.get("value")}
    if speaker == "function_call":
        message |= {"content": None, "tool_calls": _as_calls(turn.get("value"), f"{where}.value")}
    return message


def _as_calls(value: object, where: str) -> list[object]:
    problem = f"{where}: expected JSON with name and arguments of a function call"
    if not isinstance(value, str):
        raise ValueError(f"{problem}, got {kind_of(value)}")
    try:
        read = json.loads(value, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{problem}, got {shown(value)} ({error})") from None
    calls = read if isinstance(read, list) else [read]
    for call in calls or [None]:
        if not isinstance(call, dict) or not {"name", "arguments"} <= call.keys():
            raise ValueError(f"{problem}, got {shown(value)}")
    return [{"function": {key: call[key] for key in ("name", "arguments")}} for call in calls]
