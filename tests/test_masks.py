"""Tokens and masks of generated conversations against transformers' own mask of rendered text.

DeepSeek's template gets `{% generation %}` marks around what the assistant says, and no longer cuts
reasoning off; transformers then tells which tokens lie inside the marks.
"""

import re

import pytest
from chat_cases import calls, deepseek_tokenizer, property_test, texts, without_special_tokens
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_dsv3.data.templates import TEMPLATES
from megatron_dsv3.data.tokens import encode

CUT = "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
PROMPTS = ("'<｜Assistant｜>' + ", "'<｜tool▁outputs▁end｜>' + ")


def with_marks(template):
    """The template with marks around all that an assistant's turn writes, but for its prompt."""
    start = template.index("{%- if message['role'] == 'assistant' and 'tool_calls' in")
    end = template.index("{%- if message['role'] == 'tool' %}")
    assert CUT in template[start:end]
    spoken = re.sub(r"\{\{(.*?)\}\}", mark, template[start:end].replace(CUT, ""))
    return template[:start] + spoken + template[end:]


def mark(match):
    expression = match.group(1)
    for prompt in PROMPTS:
        if expression.startswith(prompt):
            prompt_text = "{{" + prompt.removesuffix(" + ") + "}}"
            said = expression.removeprefix(prompt)
            return prompt_text + "{% generation %}{{" + said + "}}{% endgeneration %}"
    return "{% generation %}{{" + expression + "}}{% endgeneration %}"


@pytest.fixture(scope="module")
def reference():
    tokenizer = deepseek_tokenizer()
    template = with_marks(tokenizer.chat_template)

    def encoded(messages):
        found = tokenizer.apply_chat_template(
            [as_text(turn) for turn in messages],
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return found["input_ids"], found["assistant_masks"]

    return encoded


def as_text(turn):
    """Reasoning written into the content, in R1's format."""
    turn = dict(turn)
    if reasoning := turn.pop("reasoning_content", None):
        turn["content"] = f"<think>\n{reasoning}\n</think>\n\n{turn['content']}"
    return turn


def assistant(**keys):
    return st.fixed_dictionaries({"role": st.just("assistant"), "content": texts}, optional=keys)


tools = st.lists(
    st.fixed_dictionaries({"role": st.just("tool"), "content": texts}), min_size=1, max_size=3
)
reasoning = {"reasoning_content": texts.filter(bool)}
answers = assistant(**reasoning)
first_calls = st.tuples(
    assistant(tool_calls=st.lists(calls, min_size=1, max_size=3), **reasoning).filter(
        lambda turn: "tool_calls" in turn
    ),
    tools,
).map(lambda pair: [pair[0], *pair[1]])
# The template writes neither text nor reasoning beside a later round of calls.
later_calls = st.tuples(
    st.fixed_dictionaries(
        {
            "role": st.just("assistant"),
            "content": st.just(""),
            "tool_calls": st.lists(calls, min_size=1, max_size=2),
        }
    ),
    tools,
).map(lambda pair: [pair[0], *pair[1]])
question = st.fixed_dictionaries({"role": st.just("user"), "content": texts})


@st.composite
def agentic_conversations(draw):
    """Rounds of question, perhaps calls and their outputs, and answer; calls in one round at most.

    In a second one this template would write calls right behind the user's words, where a token may
    belong to both: test_chat.py has that case.
    """
    turns = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    num_rounds = draw(st.integers(1, 3))
    with_calls = draw(st.integers(0, 3))
    for i in range(num_rounds):
        turns.append(draw(question))
        if i == with_calls:
            turns += draw(first_calls)
            for later in draw(st.lists(later_calls, max_size=2)):
                turns += later
        turns.append(draw(answers))
    return turns


@property_test
@given(messages=agentic_conversations())
def test_tokens_and_mask_equal_those_of_transformers(reference, messages):
    assume(without_special_tokens(messages))
    tokens, mask = reference(messages)
    encoded = encode(
        messages, deepseek_tokenizer(), TEMPLATES["deepseek_r1"], history_reasoning="keep"
    )
    assert encoded.tokens.tolist() == tokens
    assert encoded.loss.tolist() == [bool(counts) for counts in mask]
    assert encoded.dropped == ()
