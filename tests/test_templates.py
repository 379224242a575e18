import pytest
from chat_cases import (
    BOS,
    EOS,
    THINKING,
    TOOL_LOOP,
    V3_CALLS,
    assistant,
    conversations,
    deepseek_tokenizer,
    ids,
    property_test,
    reference_ids,
    spell,
    texts,
    tool,
    tool_call,
    user,
    without_special_tokens,
)
from hypothesis import assume, given

from megatron_dsv3.data.templates import TEMPLATES, find_template
from megatron_dsv3.data.tokens import encode


@pytest.fixture(scope="module")
def tokenizer():
    return deepseek_tokenizer()


# ---- Parity with the template that the tokenizer carries ----------------------------------------


@pytest.mark.parametrize("template", ["deepseek_v3", "deepseek_r1"])
@property_test
@given(messages=conversations)
def test_ids_equal_those_of_the_tokenizers_own_template(tokenizer, template, messages):
    assume(without_special_tokens(messages))
    assert ids(tokenizer, messages, template) == reference_ids(tokenizer, messages)


@pytest.mark.parametrize(
    "messages",
    [
        [assistant("alone")],
        [user(""), assistant("")],
        [user("  a\n"), assistant("\n\n b \n")],
        [{"role": "system", "content": "s\n"}, user("\nq"), assistant("a")],
        [
            user("q"),
            assistant("a"),
            {"role": "system", "content": "late"},
            user("r"),
            assistant("b"),
        ],
        [{"role": "system", "content": "1"}, {"role": "system", "content": "2"}, assistant("a")],
        [user("q"), user("r"), assistant("a"), assistant("b"), user("s")],
        TOOL_LOOP,
        TOOL_LOOP[:3],
        [*TOOL_LOOP[:3], user("stop"), assistant("ok")],
        [tool("t"), assistant("", tool_calls=[tool_call("f", "{}")]), tool("u")],
    ],
)
def test_ids_equal_the_reference_on_hand_written_conversations(tokenizer, messages):
    assert ids(tokenizer, messages) == reference_ids(tokenizer, messages)


def test_a_turn_of_calls_without_content_is_written_as_with_empty_content(tokenizer):
    # transformers leaves null keys out, and the template then fails: so no reference for null.
    null, empty = ([user("q"), assistant(c, tool_calls=[tool_call("f", "{}")])] for c in (None, ""))
    assert ids(tokenizer, null) == ids(tokenizer, empty) == reference_ids(tokenizer, empty)


# ---- Formats that the tokenizer's template doesn't write ----------------------------------------

# fmt: off
R1_GOLDEN = [  # token, its text, whether it counts
    (0, BOS, 0), (7153, "Be", 0), (9708, " brief", 0), (16, ".", 0),
    (128803, "<｜User｜>", 0), (3085, "What", 0), (344, " is", 0), (223, " ", 0), (20, "2", 0),
    (13, "+", 0), (20, "2", 0), (33, "?", 0),
    (128804, "<｜Assistant｜>", 0), (2107, "It", 1), (344, " is", 1), (223, " ", 1), (22, "4", 1),
    (16, ".", 1), (1, EOS, 1),
    (128803, "<｜User｜>", 0), (53624, "Sure", 0), (2755, "?\n", 0),
    (128804, "<｜Assistant｜>", 0), (128798, "<think>", 1), (201, "\n", 1), (10240, "Yes", 1),
    (14, ",", 1), (223, " ", 1), (22, "4", 1), (603, ".\n", 1), (128799, "</think>", 1),
    (271, "\n\n", 1), (10240, "Yes", 1), (16, ".", 1), (1, EOS, 1),
]
# fmt: on


def test_r1_golden_tokens_and_mask(tokenizer):
    encoded = encode(THINKING, tokenizer, TEMPLATES["deepseek_r1"])
    tokens = encoded.tokens.tolist()
    seen = zip(tokens, map(tokenizer.decode, ([t] for t in tokens)), encoded.loss, strict=True)
    assert list(seen) == R1_GOLDEN


@property_test
@given(system=texts, question=texts, reasoning=texts, answer=texts)
def test_r1_reasoning_has_the_published_format(tokenizer, system, question, reasoning, answer):
    assume(reasoning and without_special_tokens([system, question, reasoning, answer]))
    messages = [
        {"role": "system", "content": system},
        user(question),
        assistant(answer, reasoning_content=reasoning),
    ]
    text = (
        f"{BOS}{system}<｜User｜>{question}<｜Assistant｜><think>\n{reasoning}\n</think>\n\n"
        f"{answer}{EOS}"
    )
    assert ids(tokenizer, messages) == tokenizer.encode(text, add_special_tokens=False)
    thought = f"<think>\n{reasoning}\n</think>\n\n{answer}"
    assert ids(tokenizer, [*messages[:2], assistant(thought)]) == ids(tokenizer, messages)


@pytest.mark.parametrize(
    ("template", "messages", "text"),
    [
        (
            "deepseek_v3_1",
            THINKING,
            "<bos>Be brief.<user>What is 2+2?<assistant></think>It is 4.<eos>"
            "<user>Sure?\n<assistant><think>Yes, 4.</think>Yes.<eos>",
        ),
        (
            "deepseek_v3_1",
            TOOL_LOOP,
            "<bos><user>Weather in Rome and Oslo?<assistant></think>Let me look."
            '<calls><call>w<sep>{"c": "Rome"}</call><call>w<sep>{}</call></calls><eos>'
            "<output>20 C</output><output>5 C</output>Rome 20, Oslo 5.<eos>"
            "<user>And Bern?<assistant></think>Once more."
            '<calls><call>w<sep>{"c": "Bern"}</call></calls><eos>'
            "<output>12 C</output>Bern 12.<eos>",
        ),
        (
            "deepseek_v3_0324",
            TOOL_LOOP,
            f"<bos><user>Weather in Rome and Oslo?<assistant>Let me look.{V3_CALLS}"
            "<outputs><output>20 C</output>\n<output>5 C</output></outputs>Rome 20, Oslo 5.<eos>"
            "<user>And Bern?<assistant>Once more."
            '<calls><call>function<sep>w\n```json\n{"c": "Bern"}\n```</call></calls><eos>'
            "<outputs><output>12 C</output></outputs>Bern 12.<eos>",
        ),
        (
            "deepseek_v3_0324",
            [*TOOL_LOOP[:3], assistant("", tool_calls=[tool_call("g", "1")])],
            f"<bos><user>Weather in Rome and Oslo?<assistant>Let me look.{V3_CALLS}"
            "<outputs><output>20 C</output></outputs>"
            "<calls><call>function<sep>g\n```json\n1\n```</call></calls><eos>",
        ),
        (
            "deepseek_v3_0324",
            [user("q"), user("r"), assistant("a"), user("s")],
            "<bos><user>q<assistant><user>r<assistant>a<eos><user>s<assistant>",
        ),
        (
            "deepseek_v3_1",
            [user("q"), user("r"), assistant("a"), user("s")],
            "<bos><user>q<user>r<assistant></think>a<eos><user>s",
        ),
        (
            "deepseek_r1",
            [
                user("q"),
                assistant("c", reasoning_content="r", tool_calls=[tool_call("f", "{}")]),
                tool("t"),
                assistant("a", reasoning_content="s"),
            ],
            "<bos><user>q<assistant><think>\nr\n</think>\n\nc"
            "<calls><call>function<sep>f\n```json\n{}\n```</call></calls><eos>"
            "<outputs><output>t</output></outputs><think>\ns\n</think>\n\na<eos>",
        ),
    ],
)
def test_golden_texts(tokenizer, template, messages, text):
    history = "strip" if template == "deepseek_v3_1" else "keep"
    tokens = ids(tokenizer, messages, template, history_reasoning=history)
    assert spell(tokenizer.decode(tokens)) == text
    assert tokens == tokenizer.encode(tokenizer.decode(tokens), add_special_tokens=False)


# ---- What a template cannot write ----------------------------------------------------------------

CALLING = {"tool_calls": [tool_call("f", "{}")], "reasoning_content": "r"}


@pytest.mark.parametrize(
    ("template", "messages", "problem"),
    [
        (
            "deepseek_v3",
            THINKING,
            r"messages\[4\]: deepseek_v3 has no reasoning; use one of deepseek_r1, deepseek_v3_1",
        ),
        (
            "deepseek_v3_1",
            [user("q"), assistant("a", **CALLING)],
            r"messages\[1\]: deepseek_v3_1 has reasoning only where a turn answers the user",
        ),
        (
            "deepseek_v3_1",
            [*TOOL_LOOP[:4], assistant("a", reasoning_content="r")],
            r"messages\[4\]: deepseek_v3_1 has reasoning only where a turn answers the user",
        ),
        (
            "deepseek_r1",
            [*TOOL_LOOP[:6], assistant("", **CALLING)],
            r"messages\[6\]: deepseek_r1 has no place for reasoning in a later round of tool calls",
        ),
        (
            "deepseek_v3_1",
            [{"role": "system", "content": "s"}, assistant("a")],
            r"messages\[1\]: deepseek_v3_1 needs a user turn before this one",
        ),
    ],
)
def test_what_a_template_cannot_write_is_an_error(tokenizer, template, messages, problem):
    with pytest.raises(ValueError, match=problem):
        encode(messages, tokenizer, TEMPLATES[template])


def test_an_unknown_template_is_named():
    assert find_template("deepseek_r1").name == "deepseek_r1"
    with pytest.raises(
        ValueError, match=r"template: expected one of deepseek_v3, .*, got 'chatml'"
    ):
        find_template("chatml")
