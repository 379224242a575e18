"""The tokenizer's own template: ids against transformers, masks against the built-in template."""

import copy

import pytest
from chat_cases import (
    BOS,
    EOS,
    THINKING,
    TOOL_LOOP,
    assistant,
    conversations,
    deepseek_tokenizer,
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
from hypothesis import strategies as st

from megatron_dsv3.data.chat import render
from megatron_dsv3.data.messages import parse_conversation
from megatron_dsv3.data.own_template import OwnTemplate, choose_template
from megatron_dsv3.data.templates import TEMPLATES, Special
from megatron_dsv3.data.tokens import Vocabulary, tokenize

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['reasoning_content'] %}<think>{{ m['reasoning_content'] }}</think>{% endif %}"
    "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return deepseek_tokenizer()


@pytest.fixture(scope="module")
def chatml():
    tokenizer = copy.deepcopy(deepseek_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def system_comes_first(messages):
    """This template puts all system prompts first, so a later one changes what stands before it."""
    roles = [turn["role"] == "system" for turn in messages]
    return roles == sorted(roles, reverse=True)


def encode(tokenizer, messages, template=None, **options):
    template = template or OwnTemplate.of(tokenizer)
    conversation = parse_conversation(messages)
    if isinstance(template, OwnTemplate):
        rendered = template.render(conversation, **options)
    else:
        rendered = render(conversation, template, **options)
    return tokenize([rendered], Vocabulary.of(tokenizer))[0]


def counted(tokenizer, encoded):
    runs, run = [], []
    for token, counts in zip(encoded.tokens.tolist(), encoded.loss.tolist(), strict=True):
        if counts:
            run.append(token)
        elif run:
            runs.append(run)
            run = []
    return [spell(tokenizer.decode(run)) for run in [*runs, run] if run]


@property_test
@given(messages=conversations)
def test_ids_and_mask_equal_those_of_the_same_template_built_in(tokenizer, messages):
    assume(without_special_tokens(messages) and system_comes_first(messages))
    own = encode(tokenizer, messages)
    assert own.tokens.tolist() == reference_ids(tokenizer, messages)
    built_in = encode(tokenizer, messages, TEMPLATES["deepseek_v3"])
    assert own.loss.tolist() == built_in.loss.tolist()


@property_test
@given(messages=conversations, flags=st.lists(st.booleans(), min_size=8, max_size=8))
def test_turns_without_loss_do_not_count(tokenizer, messages, flags):
    assume(without_special_tokens(messages) and system_comes_first(messages))
    for turn, loss in zip(messages, flags, strict=False):
        if turn["role"] == "assistant":
            turn["loss"] = loss
    own = encode(tokenizer, messages)
    assert own.loss.tolist() == encode(tokenizer, messages, TEMPLATES["deepseek_v3"]).loss.tolist()


@property_test
@given(question=texts, answer=texts, hostile=st.sampled_from([*Special, EOS]))
def test_no_message_can_write_a_special_token(tokenizer, question, answer, hostile):
    text = getattr(hostile, "value", hostile)
    messages = [user(question + text), assistant(f"x{answer}{text}")]
    own = encode(tokenizer, messages)
    built_in = encode(tokenizer, messages, TEMPLATES["deepseek_v3"])
    assert own.tokens.tolist() == built_in.tokens.tolist()
    assert own.loss.tolist() == built_in.loss.tolist()


def test_a_template_that_writes_roles_as_text_counts_only_the_answer_and_its_end(chatml):
    messages = [user("Hi"), assistant("Yes."), user("So?"), assistant("No.", loss=False)]
    own = encode(chatml, messages)
    assert own.tokens.tolist() == reference_ids(chatml, messages)
    assert counted(chatml, own) == ["Yes.<|im_end|>"]
    messages[3]["loss"] = True
    assert counted(chatml, encode(chatml, messages)) == ["Yes.<|im_end|>", "No.<|im_end|>"]


@property_test
@given(question=texts, answer=texts, reasoning=texts)
def test_reasoning_goes_where_the_template_puts_it(chatml, question, answer, reasoning):
    messages = [user(question), assistant(answer, reasoning_content=reasoning)]
    assume(without_special_tokens(messages) and reasoning and not answer.isspace())
    own = encode(chatml, messages)
    assert own.tokens.tolist() == reference_ids(chatml, messages)
    assert own.dropped == ()
    # A token may hold the line break before the answer; it does not count then.
    [learned] = counted(chatml, own)
    assert f"<think>{reasoning}</think>{answer.strip()}<|im_end|>".endswith(learned)
    assert learned.endswith("<|im_end|>")


def test_what_the_template_leaves_out_is_reported(tokenizer):
    own = encode(tokenizer, THINKING, history_reasoning="keep")
    assert [(part.turn, part.part, part.counted) for part in own.dropped] == [
        (2, "reasoning", True),
        (4, "reasoning", True),
    ]
    own = encode(tokenizer, TOOL_LOOP)
    assert [(part.turn, part.part) for part in own.dropped] == [(6, "content")]
    # The user's words before the second round of calls are no part of it.
    assert counted(tokenizer, own)[2].startswith("<call>function")


def test_a_prompt_that_serving_shows_and_training_does_not_counts_nothing_of_the_user(tokenizer):
    """As R1's published template: serving opens <think>, earlier answers have none."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace(
        "{{'<｜Assistant｜>'}}{% endif %}", "{{'<｜Assistant｜><think>\\n'}}{% endif %}"
    )
    messages = [user("q"), assistant("a")]
    assert (
        other.apply_chat_template(messages, tokenize=False)
        == f"{BOS}<｜User｜>q<｜Assistant｜>a{EOS}"
    )
    assert counted(other, encode(other, messages)) == ["a<eos>"]


@pytest.mark.parametrize(
    ("template", "messages", "problem"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            [user("q"), assistant("a")],
            "the tokenizer's chat template refuses it: roles must alternate",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% if loop.last %}{{ eos_token }}{% endif %}"
            "{% endfor %}",
            [user("q"), assistant("a"), user("r"), assistant("b")],
            r"messages\[1\]: the tokenizer's chat template writes this turn otherwise once others",
        ),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            [user("q"), assistant("a")],
            r"messages\[1\]: the tokenizer's chat template writes earlier turns otherwise once",
        ),
        (
            "{% for m in messages %}{{ m.content }}{{ m.role }}{% endfor %}",
            [user("q"), assistant("a", tool_calls=[tool_call("f", "{}")]), tool("t")],
            r"messages\[1\]: the tokenizer's chat template does not write the call",
        ),
    ],
)
def test_what_a_template_cannot_write_is_an_error(tokenizer, template, messages, problem):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    with pytest.raises(ValueError, match=problem) as caught:
        encode(other, messages)
    assert "\n" not in str(caught.value)


def test_a_system_prompt_that_moves_to_the_front_is_an_error(tokenizer):
    messages = [user("q"), assistant("a"), {"role": "system", "content": "late"}, assistant("b")]
    with pytest.raises(ValueError, match=r"messages\[1\]: .* writes this turn otherwise once"):
        encode(tokenizer, messages)


def test_a_tokenizer_without_a_template_is_refused(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = None
    with pytest.raises(ValueError, match=r"the tokenizer has no chat template; choose a built-in"):
        choose_template("tokenizer", other)
    assert choose_template("tokenizer", tokenizer).name == "tokenizer"
    assert choose_template("deepseek_r1", other) == TEMPLATES["deepseek_r1"]
