import json
import shutil
from functools import partial

import pytest
from chat_cases import (
    BOS,
    EOS,
    HF_DIR,
    THINKING,
    TOOL_LOOP,
    V3_CALLS,
    assistant,
    conversations,
    counted_texts,
    deepseek_tokenizer,
    ids,
    property_test,
    reference_ids,
    texts,
    user,
    without_special_tokens,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from megatron_dsv3.data import tokens
from megatron_dsv3.data.messages import parse_conversation
from megatron_dsv3.data.own_template import OwnTemplate
from megatron_dsv3.data.templates import TEMPLATES, Special
from megatron_dsv3.data.tokens import Vocabulary, encode, load_tokenizer, render, tokenize


@pytest.fixture(scope="module")
def tokenizer():
    return deepseek_tokenizer()


@pytest.fixture(scope="module")
def plain_tokenizer():
    """The same vocabulary and merges without any special token: the reference for plain text."""
    spec = json.loads((HF_DIR / "tokenizer.json").read_text())
    return Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))


# ---- Special tokens in messages -----------------------------------------------------------------

hostile = st.lists(
    st.one_of(texts, st.sampled_from([*(s.value for s in Special), BOS, EOS, "<｜▁pad▁｜>"])),
    max_size=5,
).map("".join)


@property_test
@given(question=hostile, answer=hostile, reasoning=hostile)
def test_no_message_can_write_a_special_token(
    tokenizer, plain_tokenizer, question, answer, reasoning
):
    assume(reasoning and not answer.lstrip().startswith("<think>"))
    messages = [user(question), assistant(answer, reasoning_content=reasoning)]

    def plain(text):
        return plain_tokenizer.encode(text, add_special_tokens=False).ids

    think = tokenizer.convert_tokens_to_ids("<think>")
    assert ids(tokenizer, messages) == [
        *(tokenizer.bos_token_id, 128803, *plain(question), 128804),
        *(think, *plain(f"\n{reasoning}\n"), think + 1, *plain(f"\n\n{answer}")),
        tokenizer.eos_token_id,
    ]


# ---- Masks --------------------------------------------------------------------------------------


def test_assistant_turns_and_their_end_count_and_nothing_else(tokenizer):
    assert counted_texts(tokenizer, TOOL_LOOP[:5]) == [
        f"Let me look.{V3_CALLS}",
        "Rome 20, Oslo 5.<eos>",
    ]


def test_a_turn_with_loss_false_does_not_count_nor_does_its_end(tokenizer):
    messages = [user("q"), assistant("a", loss=False), user("r"), assistant("b")]
    assert counted_texts(tokenizer, messages) == ["b<eos>"]
    silent = [user("q"), assistant("a"), user("r"), assistant("b", loss=False)]
    assert counted_texts(tokenizer, silent) == ["a<eos>"]


def test_an_empty_answer_counts_its_end(tokenizer):
    assert counted_texts(tokenizer, [user("q"), assistant("")]) == ["<eos>"]


def test_the_mode_that_serving_chooses_does_not_count(tokenizer):
    assert counted_texts(tokenizer, THINKING, "deepseek_v3_1") == [
        "It is 4.<eos>",
        "Yes, 4.</think>Yes.<eos>",
    ]
    assert counted_texts(tokenizer, THINKING, "deepseek_r1", history_reasoning="keep") == [
        "<think>\n2+2 is 4.\n</think>\n\nIt is 4.<eos>",
        "<think>\nYes, 4.\n</think>\n\nYes.<eos>",
    ]


def test_a_token_over_the_seam_of_user_and_assistant_does_not_count(tokenizer):
    # The line break before a later round of calls and the user's "?" are one token.
    messages = [*TOOL_LOOP[:5], user("So?"), *TOOL_LOOP[6:]]
    assert ids(tokenizer, messages) == reference_ids(tokenizer, messages)
    assert counted_texts(tokenizer, messages)[2].startswith("<call>function<sep>w")


@property_test
@given(messages=conversations, flags=st.lists(st.booleans(), min_size=8, max_size=8))
def test_the_mask_never_changes_the_tokens(tokenizer, messages, flags):
    for turn, loss in zip(messages, flags, strict=False):
        if turn["role"] == "assistant":
            turn["loss"] = loss
    assume(without_special_tokens(messages))
    encoded = encode(messages, tokenizer, TEMPLATES["deepseek_r1"])
    assert encoded.tokens.tolist() == reference_ids(tokenizer, messages)
    ends = encoded.loss[encoded.tokens == tokenizer.eos_token_id].tolist()
    assert ends == [turn["loss"] for turn in messages if turn["role"] == "assistant"]


# ---- What is not written ------------------------------------------------------------------------


def test_stripped_reasoning_is_reported_with_whether_it_counted(tokenizer):
    silent = assistant("a", reasoning_content="r", loss=False)
    messages = [user("q"), silent, *THINKING[1:]]
    dropped = encode(messages, tokenizer, TEMPLATES["deepseek_r1"]).dropped
    assert [(part.turn, part.part, part.counted) for part in dropped] == [
        (1, "reasoning", False),
        (3, "reasoning", True),
    ]
    kept = encode(messages, tokenizer, TEMPLATES["deepseek_r1"], history_reasoning="keep")
    assert kept.dropped == ()


def test_text_that_the_template_leaves_out_is_reported(tokenizer):
    dropped = encode(TOOL_LOOP, tokenizer, TEMPLATES["deepseek_r1"]).dropped
    assert [(part.turn, part.part, part.counted) for part in dropped] == [(6, "content", True)]
    assert "deepseek_r1 writes no text beside a later round of tool calls" in dropped[0].reason
    assert encode(TOOL_LOOP, tokenizer, TEMPLATES["deepseek_v3_1"]).dropped == ()


# Ends of words with all that may follow them, and special tokens' text across them.
CUTS = (
    '{"k9":["v",{}]}',
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "aGVs+bG8/d29y",
    "e\u0301-x_.y",
    "don't",
    "word a",
    "word\n\n b",
    "w  \n",
    "x \u4f60\u597d\n",
    "12 345",
    "_\n_\n\n",
    "<｜User｜> <think>\n",
    "é e\u0301 ",
)

# ---- Many at once, and the tokenizer ------------------------------------------------------------


def test_spaces_that_a_tokenizer_leaves_out_belong_to_both_neighbours():
    # " a", " b", "c " of " a bc ", trimmed as many tokenizers report them.
    assert list(tokens._without_gaps([(1, 2), (3, 4), (4, 5)], 6)) == [(0, 3), (2, 4), (4, 6)]


@pytest.mark.parametrize("characters_per_call", [1, 60, 1 << 22])
def test_many_conversations_at_once_are_the_same_as_one_by_one(
    tokenizer, monkeypatch, characters_per_call
):
    monkeypatch.setattr(tokens, "_CHARACTERS_PER_CALL", characters_per_call)
    template = TEMPLATES["deepseek_r1"]
    rows = [THINKING, TOOL_LOOP, [user("<｜User｜>"), assistant(EOS)]]
    vocabulary = Vocabulary.of(tokenizer)
    together = tokenize([render(parse_conversation(row), template) for row in rows], vocabulary)
    for row, encoded in zip(rows, together, strict=True):
        alone = encode(row, tokenizer, template)
        assert encoded.tokens.tolist() == alone.tokens.tolist()
        assert encoded.loss.tolist() == alone.loss.tolist()
        assert encoded.dropped == alone.dropped
    assert tokenize([], vocabulary) == []


@property_test
@given(pieces=st.lists(st.one_of(texts, st.sampled_from(CUTS)), min_size=4, max_size=60))
def test_a_long_text_has_the_tokens_that_it_has_in_one_piece(tokenizer, plain_tokenizer, pieces):
    text = "".join(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_LONGEST_PART", 16)
        parts = list(tokens._parts(text, tokenizer.backend_tokenizer))
        [(_, encoded)] = tokens._encode_texts([text], Vocabulary.of(tokenizer))
    assert "".join(parts) == text
    assert encoded.ids.tolist() == plain_tokenizer.encode(text, add_special_tokens=False).ids


def test_a_long_text_is_cut_where_it_can_be(tokenizer, monkeypatch):
    backend = tokenizer.backend_tokenizer
    monkeypatch.setattr(tokens, "_LONGEST_PART", 400)
    words = "It is a word, 1234 of them.\n" * 200
    assert max(map(len, tokens._parts(words, backend))) <= 400
    assert list(tokens._parts("a" * 5000, backend)) == ["a" * 5000]
    # What holds no space, and what comes after a stretch that cannot be cut.
    for text in (
        '{"a1":[1,{}],"b":2},' * 200,
        "\u4f60\u597d\uff0c\u4e16\u754c\u3002" * 300,
        "qT+9/" * 900,
    ):
        assert max(map(len, tokens._parts(text, backend))) <= 400
    assert max(map(len, tokens._parts("a" * 2000 + words, backend))) <= 2600


def test_a_text_that_comes_again_is_tokenised_once(tokenizer, monkeypatch):
    asked = []
    real = tokens._encode_texts
    monkeypatch.setattr(tokens, "_encode_texts", lambda t, v: [asked.extend(t), *real(t, v)][1:])
    rows = [parse_conversation(row) for row in ([user("q"), assistant("q")], THINKING, THINKING)]
    rendered = [render(row, TEMPLATES["deepseek_r1"]) for row in rows]
    known: dict = {}
    first, second, third = tokenize(rendered, Vocabulary.of(tokenizer), known)
    assert sorted(asked) == sorted(set(asked)) == sorted(known)
    assert second.tokens.tolist() == third.tokens.tolist()
    assert (first.tokens[2], first.loss.tolist()) == (first.tokens[4], [False] * 4 + [True] * 2)
    [again] = tokenize(rendered[1:2], Vocabulary.of(tokenizer), known)
    assert again.tokens.tolist() == second.tokens.tolist()
    assert len(asked) == len(known)


def test_special_tokens_that_words_spell_are_told(tokenizer):
    messages = [user("<｜User｜> a </think>"), assistant("<think>r</think><think>b</think>")]
    encoded = encode(messages, tokenizer, TEMPLATES["deepseek_r1"])
    assert encoded.spelled == {"<｜User｜>", "<think>", "</think>"}
    assert encode(THINKING, tokenizer, TEMPLATES["deepseek_r1"]).spelled == set()


def test_a_name_is_written_by_no_template_and_told(tokenizer):
    messages = [{**user("q"), "name": "bob"}, assistant("a")]
    for template in (TEMPLATES["deepseek_v3"], OwnTemplate.of(tokenizer)):
        render_ = (
            template.render
            if isinstance(template, OwnTemplate)
            else partial(render, template=template)
        )
        [dropped] = render_(parse_conversation(messages)).dropped
        assert (dropped.turn, dropped.part, dropped.counted) == (0, "name", False)


def test_a_tokenizer_set_to_truncate_and_pad_encodes_in_full(tokenizer):
    whole = ids(tokenizer, THINKING)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9, pad_id=5)
    assert ids(tokenizer, THINKING) == whole


def copy_tokenizer(directory, **config):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(HF_DIR / name, directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def test_a_tokenizer_without_the_templates_tokens_is_refused(tmp_path):
    copy_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"<think>"', '"<other>"'))
    tokenizer = load_tokenizer(tmp_path)
    assert ids(tokenizer, [user("q"), assistant("a")])
    with pytest.raises(ValueError, match=rf"{tmp_path}: no special token <think> in the tokenizer"):
        ids(tokenizer, THINKING)


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_a_tokenizer_is_what_transformers_would_load(tmp_path, name):
    copy_tokenizer(tmp_path, tokenizer_class=name)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.init_kwargs == theirs.init_kwargs
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_tokenizer_file_is_named(tmp_path, name):
    copy_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/{name}: not found; expected the"):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_file_is_named(tmp_path):
    copy_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=rf"{tmp_path}: the tokenizer does not load: ") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    copy_tokenizer(tmp_path, eos_token=None)
    with pytest.raises(ValueError, match=r"tokenizer_config.json: eos_token is missing"):
        load_tokenizer(tmp_path)


def test_a_tokenizers_own_code_is_not_run(tmp_path):
    auto_map = {"AutoTokenizer": ["code.Custom", None]}
    copy_tokenizer(tmp_path, tokenizer_class="Custom", auto_map=auto_map)
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Custom: pass\n")
    with pytest.raises(
        ValueError, match=rf"{tmp_path}: the tokenizer does not load: .* custom code"
    ):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()
