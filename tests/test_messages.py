import math

import pytest

from megatron_dsv3.data.messages import Message, ToolCall, expand_turns, parse_conversation

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def call(**function):
    return {"type": "function", "function": {"name": "f", "arguments": "{}", **function}}


def test_every_role_is_read_and_only_assistants_count_by_default():
    turns = parse_conversation(
        [
            {"role": "developer", "content": "d"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "content": None, "tool_calls": [call(arguments='{"x": 1}')]},
            {"role": "tool", "content": "t", "tool_call_id": "1", "name": "f"},
            {"role": "assistant", "content": "", "reasoning_content": "r", "loss": False},
        ]
    )
    assert turns == (
        Message("system", "d"),
        Message("user", "a\nb"),
        Message("assistant", "", tool_calls=(ToolCall("function", "f", '{"x": 1}'),), loss=True),
        Message("tool", "t"),
        Message("assistant", "", reasoning="r", loss=False),
    )


@pytest.mark.parametrize(
    ("content", "reasoning", "answer"),
    [
        ("<think>\nr\n</think>\n\na", "r", "a"),
        ("<think>r</think>a", "r", "a"),
        (" \n<think>r\n\n</think>a\n", "r\n", "a\n"),
        ("<think>\n\n r </think>\n\n\na", "\n r ", "\na"),
        ("<think>\n\n</think>\n\na", "", "a"),
        ("<think></think>", "", ""),
        ("<think>r</think>a</think>b", "r", "a</think>b"),
        ("a <think>r</think>", None, "a <think>r</think>"),
        ("r</think>a", None, "r</think>a"),
    ],
)
def test_only_a_leading_think_block_is_reasoning(content, reasoning, answer):
    (turn,) = parse_conversation([{"role": "assistant", "content": content}])
    assert (turn.reasoning, turn.content) == (reasoning, answer)


def test_a_think_block_of_a_user_stays_text():
    turns = parse_conversation([{"role": "user", "content": "<think>r</think>q"}, ANSWER])
    assert turns[0] == Message("user", "<think>r</think>q")


def test_empty_keys_as_tables_write_them_mean_nothing():
    empty = {"tool_calls": None, "reasoning_content": None, "loss": None, "refusal": None}
    turns = parse_conversation([{**USER, **empty, "annotations": []}, {**ANSWER, **empty}])
    assert turns == (Message("user", "q"), Message("assistant", "a", loss=True))
    assert parse_conversation([{**ANSWER, "reasoning_content": "", "tool_calls": []}]) == (
        turns[1],
    )


def test_arguments_given_as_an_object_become_json():
    turns = parse_conversation([{**ANSWER, "tool_calls": [call(arguments={"x": "\u00e9"})]}])
    assert turns[0].tool_calls[0].arguments == '{"x": "\u00e9"}'


def test_expanding_gives_one_conversation_a_counted_turn():
    first = {**ANSWER, "reasoning_content": "r"}
    silent = {**ANSWER, "loss": False}
    turns = parse_conversation([USER, first, USER, silent, USER, ANSWER, USER])
    one, other = expand_turns(turns)
    assert one == turns[:2]
    assert [turn.loss for turn in other] == [False] * 5 + [True]
    assert [turn.content for turn in other] == [turn.content for turn in turns[:6]]
    assert list(expand_turns(parse_conversation([USER, silent]))) == []


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (None, r"messages: expected a list of turns, got null"),
        ("hi", r"messages: expected a list of turns, got a string"),
        ([], r"messages: empty conversation; expected at least one assistant turn"),
        ([USER, USER], r"messages: no assistant turn to learn from, got only user, user"),
        (["hi"], r"messages\[0\]: expected an object with role and content, got a string"),
        (
            [USER, {"role": "bot", "content": "a"}],
            r"messages\[1\]\.role: expected one of system, .*, tool, got 'bot'",
        ),
        ([{"content": "a"}], r"messages\[0\]\.role: expected one of .*, got None"),
        ([{"role": ["user"], "content": "a"}], r"messages\[0\]\.role: expected .*, got \['user'\]"),
        ([{"role": "user"}], r"messages\[0\]\.content: expected a string, got null"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content: expected a string, got int"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            r"messages\[0\]\.content\[0\]: expected a part of type 'text', got 'image_url'",
        ),
        (
            [{"role": "user", "content": ["a"]}],
            r"messages\[0\]\.content\[0\]: expected a part of type 'text', got 'a string'",
        ),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            r"messages\[0\]\.content\[0\]\.text: expected a string, got null",
        ),
        (
            [{"role": "user", "content": "ab\ud83d"}],
            r"messages\[0\]\.content: half of a surrogate pair \(U\+D83D\) at character 2",
        ),
        (
            [{**ANSWER, "reasoning_contents": "r"}],
            r"unknown key 'reasoning_contents' .* assistant; did you mean 'reasoning_content'\?",
        ),
        (
            [{**ANSWER, "weight": 0}],
            r"unknown key 'weight' in a turn of assistant; expected role, content, ",
        ),
        ([{**USER, "tool_calls": [call()]}], r"unknown key 'tool_calls' in a turn of user"),
        ([{**ANSWER, "loss": 1}], r"messages\[0\]\.loss: expected true or false, got 1"),
        ([{**USER, "loss": True}], r"only assistant turns are learned, got true for user"),
        ([{**ANSWER, "content": None}], r"messages\[0\]\.content: expected a string, got null"),
        ([{**ANSWER, "reasoning_content": ["r"]}], r"reasoning_content: expected a string, got a "),
        (
            [{"role": "assistant", "content": "<think>r"}],
            r"messages\[0\]\.content: <think> has no </think>; is the turn cut off\?",
        ),
        (
            [{"role": "assistant", "content": "<think>r</think>a", "reasoning_content": "r"}],
            r"messages\[0\]: both reasoning_content and a leading <think> in content; keep one",
        ),
        (
            [{**ANSWER, "tool_calls": call()}],
            r"tool_calls: expected a list of calls, got an object",
        ),
        (
            [{**ANSWER, "tool_calls": [{"name": "f"}]}],
            r"tool_calls\[0\]: expected an object with 'function', got the keys name",
        ),
        ([{**ANSWER, "tool_calls": [3]}], r"tool_calls\[0\]: expected .* 'function', got int"),
        (
            [{**ANSWER, "tool_calls": [call(name=None)]}],
            r"tool_calls\[0\]\.function\.name: expected a string, got null",
        ),
        (
            [{**ANSWER, "tool_calls": [call(arguments={"x": [1, math.nan]})]}],
            r"tool_calls\[0\]\.function\.arguments: expected what JSON can hold, got .*: nan",
        ),
        (
            [{**ANSWER, "tool_calls": [call(arguments={"x": nested(100_000)})]}],
            r"tool_calls\[0\]\.function\.arguments: expected what JSON can hold, got .*recursion",
        ),
        (
            [{**ANSWER, "tool_calls": [call(arguments={"x": b"a table's"})]}],
            r"tool_calls\[0\]\.function\.arguments: expected what JSON can hold, got .* bytes",
        ),
        (
            [{**ANSWER, "tool_calls": [call(arguments=[1])]}],
            r"tool_calls\[0\]\.function\.arguments: expected a string, got a list",
        ),
    ],
)
def test_a_bad_conversation_is_named(messages, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        parse_conversation(messages)
    assert "\n" not in str(caught.value)
