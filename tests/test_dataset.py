import json
import re

import numpy as np
import pytest
from chat_cases import assistant, deepseek_tokenizer, user
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dsv3.data.dataset import (
    EMPTY_SAMPLE,
    Position,
    global_batches,
    load_samples,
    rank_micro_batches,
    sample_order,
)
from megatron_dsv3.data.store import Sample
from megatron_dsv3.data.templates import TEMPLATES
from megatron_dsv3.data.tokens import encode

R1 = TEMPLATES["deepseek_r1"]
property_test = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def tokenizer():
    return deepseek_tokenizer()


def write_rows(path, *conversations):
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in conversations))
    return path


def chat(answer, **keys):
    return [user("q"), assistant(answer, **keys)]


THOUGHT = [user("q"), assistant("a", reasoning_content="r"), user("s"), assistant("b")]


# ---- Loading ------------------------------------------------------------------------------------


def test_samples_are_the_encoded_rows_in_order(tmp_path, tokenizer):
    one = write_rows(tmp_path / "one.jsonl", chat("a"), THOUGHT)
    two = write_rows(tmp_path / "two.jsonl", chat("c", loss=True))
    loaded = load_samples([one, two], tokenizer, R1, seq_length=64)
    assert [sample.id for sample in loaded.samples] == [f"{one}:1", f"{one}:2", f"{two}:1"]
    rows = (chat("a"), THOUGHT, chat("c"))
    for sample, messages in zip(loaded.samples, rows, strict=True):
        encoded = encode(messages, tokenizer, R1)
        assert sample.tokens.tolist() == encoded.tokens.tolist()
        assert sample.loss.tolist() == encoded.loss.tolist()


def test_more_rows_than_one_call_of_the_tokenizer_takes(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", *(chat(f"answer {i}") for i in range(1100)))
    loaded = load_samples([path], tokenizer, R1, seq_length=64)
    assert [sample.id for sample in loaded.samples] == [f"{path}:{i + 1}" for i in range(1100)]
    decoded = tokenizer.decode(loaded.samples[777].tokens.tolist())
    assert "answer 777" in decoded
    assert loaded.report.rows == 1100


def test_the_report_accounts_for_every_row_and_token(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", chat("a"), chat("b " * 100), THOUGHT, chat("c " * 200))
    lengths = [len(encode(m, tokenizer, R1).tokens) for m in (chat("b " * 100), chat("c " * 200))]
    loaded = load_samples([path], tokenizer, R1, seq_length=32)
    report = loaded.report
    assert (report.rows, report.samples, report.too_long) == (4, 2, 2)
    assert (report.truncated, report.without_counted) == (0, 0)
    # <bos><user>q<assistant>a<eos>, and the same once more for THOUGHT but for <bos>.
    assert (report.tokens, report.counted_tokens) == (6 + 11, 2 + 4)
    assert report.longest == ((f"{path}:4", lengths[1]), (f"{path}:2", lengths[0]))
    assert report.lost_tokens == sum(lengths)
    assert report.not_written == {
        "reasoning (counted): earlier turns' reasoning is stripped, as when served": 1
    }


def test_truncation_keeps_the_start_and_counts_the_rest(tmp_path, tokenizer):
    long_question = [user("q " * 100), assistant("a")]
    path = write_rows(tmp_path / "a.jsonl", chat("b " * 100), long_question, chat("c"))
    loaded = load_samples([path], tokenizer, R1, seq_length=32, too_long="truncate")
    whole = [encode(m, tokenizer, R1) for m in (chat("b " * 100), long_question)]
    first, last = loaded.samples
    assert first.tokens.tolist() == whole[0].tokens[:32].tolist()
    assert first.loss.tolist() == whole[0].loss[:32].tolist()
    assert last.id == f"{path}:3"
    report = loaded.report
    assert (report.truncated, report.without_counted, report.too_long) == (1, 1, 0)
    assert report.lost_tokens == len(whole[0].tokens) - 32 + len(whole[1].tokens)
    assert len(report.longest) == 2


def test_a_sample_as_long_as_the_sequence_fits(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", chat("a"))
    assert load_samples([path], tokenizer, R1, seq_length=6).report.samples == 1
    with pytest.raises(ValueError, match=r"a.jsonl:1: 6 tokens, but the sequence length is 5; "):
        load_samples([path], tokenizer, R1, seq_length=5, too_long="error")


def test_expanding_trains_every_turn_on_its_own(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", THOUGHT)
    loaded = load_samples([path], tokenizer, R1, seq_length=64, history_reasoning="expand")
    assert [sample.id for sample in loaded.samples] == [f"{path}:1#1", f"{path}:1#3"]
    silent = [THOUGHT[0], {**THOUGHT[1], "loss": False}, *THOUGHT[2:]]
    for sample, messages in zip(loaded.samples, (THOUGHT[:2], silent), strict=True):
        encoded = encode(messages, tokenizer, R1)
        assert sample.tokens.tolist() == encoded.tokens.tolist()
        assert sample.loss.tolist() == encoded.loss.tolist()
    assert [part for part in loaded.report.not_written if "(counted)" in part] == []


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "messages: empty conversation"),
        ([{"role": "bot", "content": "a"}], "messages[0].role: expected one of system, "),
        ([user("q")], "messages: no assistant turn to learn from, got only user"),
        (
            [*chat("a", loss=False), *chat("b", loss=False)],
            "no counted token: loss is false on all 2 assistant turns; set it true on one, or ",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_and_row(tmp_path, tokenizer, messages, problem):
    path = write_rows(tmp_path / "a.jsonl", chat("a"), messages)
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: {problem}")):
        load_samples([path], tokenizer, R1, seq_length=64)


def test_what_the_template_cannot_write_is_named_by_file_and_row(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", chat("a", reasoning_content="r"))
    with pytest.raises(ValueError, match=rf"{path}:1: messages\[1\]: deepseek_v3 has no reasoning"):
        load_samples([path], tokenizer, TEMPLATES["deepseek_v3"], seq_length=64)


def test_data_of_which_nothing_is_left_are_an_error(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", chat("a"), chat("b"))
    problem = r"no sample left of 2 rows: 2 longer than 3 tokens, 0 with no .* raise the sequence"
    with pytest.raises(ValueError, match=problem):
        load_samples([path], tokenizer, R1, seq_length=3)
    with pytest.raises(ValueError, match=r"left of 2 rows: 0 longer than 3 tokens, 2 with no coun"):
        load_samples([path], tokenizer, R1, seq_length=3, too_long="truncate")


def test_an_unknown_policy_is_named(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", chat("a"))
    with pytest.raises(ValueError, match=r"too_long: expected one of drop, .*, got 'split'"):
        load_samples([path], tokenizer, R1, seq_length=3, too_long="split")


# ---- Order and position -------------------------------------------------------------------------


def make_samples(num_samples):
    return [Sample(str(i), np.zeros(1, np.int32), np.ones(1, np.bool_)) for i in range(num_samples)]


def batch_ids(batches):
    return [[sample.id for sample in batch.samples] for batch in batches]


@property_test
@given(
    num_samples=st.integers(1, 200),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 1000),
)
def test_every_epoch_is_a_permutation_of_its_own(num_samples, seed, epoch):
    order = sample_order(num_samples, seed, epoch)
    assert sorted(order) == list(range(num_samples))
    assert np.array_equal(order, sample_order(num_samples, seed, epoch))
    if num_samples >= 20:
        assert not np.array_equal(order, sample_order(num_samples, seed, epoch + 1))
        assert not np.array_equal(order, sample_order(num_samples, seed + 1, epoch))


def test_the_order_never_changes_between_versions():
    # A run resumed under other versions goes on where it stopped: keep these numbers.
    assert sample_order(8, seed=1234, epoch=0).tolist() == [7, 3, 0, 1, 4, 2, 5, 6]
    assert sample_order(8, seed=1234, epoch=1).tolist() == [0, 5, 6, 4, 2, 1, 7, 3]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_is_no_key_is_refused(seed):
    with pytest.raises(ValueError, match=rf"seed: expected 0 to 2\*\*64 - 1, got {seed}"):
        sample_order(3, seed=seed, epoch=0)


@property_test
@given(
    num_samples=st.integers(1, 13),
    global_batch_size=st.integers(1, 17),
    num_epochs=st.integers(1, 4),
)
def test_a_run_sees_every_sample_once_an_epoch(num_samples, global_batch_size, num_epochs):
    samples = make_samples(num_samples)
    batches = list(
        global_batches(samples, global_batch_size=global_batch_size, seed=3, num_epochs=num_epochs)
    )
    assert all(len(batch.samples) == global_batch_size for batch in batches)
    flat = [sample for batch in batches for sample in batch.samples]
    num_seen = num_samples * num_epochs
    expected = [str(i) for epoch in range(num_epochs) for i in sample_order(num_samples, 3, epoch)]
    assert [sample.id for sample in flat[:num_seen]] == expected
    assert all(sample is EMPTY_SAMPLE for sample in flat[num_seen:])
    assert len(flat) - num_seen < global_batch_size
    assert batches[-1].after == Position(num_epochs, 0)


@property_test
@given(
    num_samples=st.integers(1, 13),
    global_batch_size=st.integers(1, 17),
    data=st.data(),
)
def test_a_run_resumed_goes_on_as_if_never_stopped(num_samples, global_batch_size, data):
    samples = make_samples(num_samples)
    options = {"global_batch_size": global_batch_size, "seed": 5, "num_epochs": 4}
    whole = list(global_batches(samples, **options))
    stop = data.draw(st.integers(0, len(whole) - 1))
    rest = list(global_batches(samples, position=whole[stop].after, **options))
    assert batch_ids(rest) == batch_ids(whole[stop + 1 :])
    assert [batch.after for batch in rest] == [batch.after for batch in whole[stop + 1 :]]


def test_without_a_number_of_epochs_batches_never_end():
    batches = global_batches(make_samples(3), global_batch_size=2, seed=0)
    seen = [next(batches) for _ in range(5)]
    assert [batch.after for batch in seen] == [
        Position(0, 2),
        Position(1, 1),
        Position(2, 0),
        Position(2, 2),
        Position(3, 1),
    ]


@pytest.mark.parametrize(("num_samples", "sample"), [(3, 3), (3, -1), (0, 0)])
def test_a_position_outside_the_data_is_refused(num_samples, sample):
    batches = global_batches(
        make_samples(num_samples), global_batch_size=2, seed=0, position=Position(1, sample)
    )
    problem = f"position: sample {sample} of an epoch of {num_samples}; are these the data"
    with pytest.raises(ValueError, match=problem):
        next(batches)


# ---- Ranks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dp_size", [1, 2, 3, 6])
def test_ranks_share_the_same_micro_batches_at_every_size(dp_size):
    samples = make_samples(12)
    of_rank = [
        rank_micro_batches(samples, micro_batch_size=2, dp_rank=rank, dp_size=dp_size)
        for rank in range(dp_size)
    ]
    # Card by card: the first of every rank, the second of every rank, ...
    dealt = [batch for deal in zip(*of_rank, strict=True) for batch in deal]
    assert [[sample.id for sample in batch] for batch in dealt] == [
        [str(2 * k), str(2 * k + 1)] for k in range(6)
    ]


def test_sizes_that_do_not_divide_are_shown():
    problem = (
        r"global_batch_size \(10\) must be a multiple of micro_batch_size \(2\) \* dp \(3\) = 6"
    )
    with pytest.raises(ValueError, match=problem):
        rank_micro_batches(make_samples(10), micro_batch_size=2, dp_rank=0, dp_size=3)
