import json

import pytest

from megatron_dsv3.data.messages import parse_conversation
from megatron_dsv3.data.rows import RowError
from megatron_dsv3.data.schemas import read_chat

QUESTION = {"from": "human", "value": "q"}
ANSWER = {"from": "gpt", "value": "<think>r</think>a"}
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def share_gpt(*turns, **keys):
    return {"conversations": list(turns), **keys}


def test_share_gpt_reads_as_the_same_messages():
    call = {"name": "f", "arguments": {"x": 1}}
    chat = read_chat(
        share_gpt(
            QUESTION,
            {"from": "function_call", "value": json.dumps([call, call])},
            {"from": "observation", "value": "t"},
            {**ANSWER, "loss": False},
            {"from": "user", "value": "r"},
            {"from": "assistant", "value": "b", "weight": None},
            system="s",
            tools="",
            id=3,
        )
    )
    function = {"name": "f", "arguments": '{"x": 1}'}
    assert chat.schema == "conversations"
    assert chat.conversation == parse_conversation(
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": function}] * 2},
            {"role": "tool", "content": "t"},
            {"role": "assistant", "content": "a", "reasoning_content": "r", "loss": False},
            {"role": "user", "content": "r"},
            {"role": "assistant", "content": "b"},
        ]
    )


def test_a_system_prompt_beside_the_turns_is_the_first_turn():
    chat = read_chat({"messages": MESSAGES, "system": "s"})
    assert chat.conversation == parse_conversation([{"role": "system", "content": "s"}, *MESSAGES])


def test_empty_columns_of_a_table_decide_nothing():
    row = {"messages": MESSAGES, "conversations": None, "system": None, "tools": None}
    assert read_chat(row) == ("messages", parse_conversation(MESSAGES))
    with pytest.raises(RowError, match="messages: expected a list of turns, got null"):
        read_chat({"messages": None, "conversations": None})


CALL_WITH_A_KEY_TWICE = '{"name": "f", "arguments": {"a": 1, "a": 2}}'


@pytest.mark.parametrize(
    ("row", "reason", "problem"),
    [
        (3, "not an object", "expected an object with messages, got int"),
        ({"\ud800": 1, "\x1b[2J": 1}, "unknown schema", r"got '\\ud800', '\\x1b\[2J'$"),
        ({"k" * 99: 1, **dict.fromkeys("abcdefghij")}, "unknown schema", "k{60}, a, .* g and 3 m"),
        (
            share_gpt({"from": "x" * 999, "value": "a"}),
            "bad conversation",
            r"got 'x{56}\.\.\.$",
        ),
        (None, "not an object", "expected an object with messages, got null"),
        ([1], "not an object", "expected an object with messages, got a list"),
        ({}, "unknown schema", "expected .* the key messages or conversations, got none"),
        ({"text": "a", "id": 1}, "unknown schema", "messages or conversations, got text, id"),
        (
            {"messages": MESSAGES, "conversations": [QUESTION, ANSWER]},
            "unknown schema",
            "expected one of messages and conversations, got both",
        ),
        (
            {"messages": MESSAGES, "tools": [{"type": "function"}]},
            "bad conversation",
            "DeepSeek's templates write no tool definitions, so tools would be lost",
        ),
        ({"messages": [3]}, "bad conversation", r"messages\[0\]: expected an object with role"),
        (share_gpt(), "bad conversation", "conversations: empty conversation"),
        ({"conversations": "hi"}, "bad conversation", "conversations: expected a list of turns"),
        (share_gpt("hi"), "bad conversation", r"conversations\[0\]: expected .* from and value"),
        (
            share_gpt(QUESTION, {"from": "bot", "value": "a"}),
            "bad conversation",
            r"conversations\[1\]\.from: expected one of system, human, .*, got 'bot'",
        ),
        (
            share_gpt({"from": ["gpt"], "value": "a"}),
            "bad conversation",
            r"conversations\[0\]\.from: expected one of .*, got \['gpt'\]",
        ),
        (
            share_gpt(QUESTION, {"from": "gpt"}),
            "bad conversation",
            r"conversations\[1\]\.content: expected a string, got null",
        ),
        (
            share_gpt({**QUESTION, "role": "user"}, ANSWER),
            "bad conversation",
            r"conversations\[0\]: role beside from and value; expected one way of writing",
        ),
        (
            share_gpt(QUESTION, {**ANSWER, "lose": True}),
            "bad conversation",
            r"conversations\[1\]: unknown key 'lose' .*; did you mean 'loss'\?",
        ),
        (
            share_gpt({"from": "function_call", "value": "f(1)"}),
            "bad conversation",
            r"conversations\[0\]\.value: expected JSON with name and arguments .*, got 'f\(1\)'",
        ),
        (
            share_gpt({"from": "function_call", "value": '{"name": "f"}'}),
            "bad conversation",
            r"conversations\[0\]\.value: expected JSON with name and arguments .*, got '\{\"name",
        ),
        (
            share_gpt(QUESTION, {"from": "function_call", "value": "[]"}),
            "bad conversation",
            r"conversations\[1\]\.value: expected JSON with name and arguments .*, got '\[\]'",
        ),
        (
            share_gpt({"from": "function_call", "value": CALL_WITH_A_KEY_TWICE}),
            "bad conversation",
            r"conversations\[0\]\.value: .* \(the key 'a' stands twice in one object\)",
        ),
        (
            share_gpt({"from": "function_call", "value": None}),
            "bad conversation",
            r"conversations\[0\]\.value: expected JSON with name and arguments .*, got null",
        ),
        (share_gpt(QUESTION), "bad conversation", "conversations: no assistant turn to learn from"),
        (share_gpt(ANSWER, system=3), "bad conversation", "system: expected a string, got int"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(row, reason, problem):
    with pytest.raises(RowError, match=problem) as caught:
        read_chat(row)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)
