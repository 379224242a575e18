import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dsv3.data.batch import counted_tokens, make_batch, pack_batch, shift_targets
from megatron_dsv3.data.store import Sample

PAD = 1
EMPTY_SAMPLE = Sample("", np.zeros(0, np.int32), np.zeros(0, np.bool_))
property_test = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def sample(tokens, loss, name="s"):
    return Sample(name, np.array(tokens, np.int32), np.array(loss, np.bool_))


samples = st.lists(st.tuples(st.integers(2, 129279), st.booleans()), max_size=9).map(
    lambda rows: sample([token for token, _ in rows], [counted for _, counted in rows])
)


def test_a_batch_by_hand():
    one = sample([10, 11, 12, 13], [0, 0, 1, 1], "one")
    two = sample([20, 21], [0, 1], "two")
    batch = make_batch([one, two], seq_length=5, num_mtp=1, pad_id=PAD)
    assert batch.tokens.tolist() == [[10, 11, 12, 13, PAD], [20, 21, PAD, PAD, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert batch.labels.tolist() == [
        [[0, 12, 13, 0, 0], [21, 0, 0, 0, 0]],
        [[12, 13, 0, 0, 0], [0, 0, 0, 0, 0]],
    ]
    assert batch.loss_mask.tolist() == [
        [[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]],
        [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]],
    ]
    assert batch.padding.tolist() == [[False] * 4 + [True], [False] * 2 + [True] * 3]
    assert batch.sample_ids == ("one", "two")
    assert counted_tokens(batch).tolist() == [3, 2]


def test_a_packed_batch_by_hand():
    one, two = sample([10, 11, 12], [0, 1, 1], "one"), sample([20, 21], [0, 1], "two")
    three = sample([30, 31, 32, 33, 34], [0, 0, 0, 1, 1], "three")
    batch = pack_batch([[one, two], [three], []], row_length=8, multiple=2, num_mtp=1, pad_id=PAD)
    assert batch.tokens.tolist() == [
        [10, 11, 12, PAD, 20, 21, PAD, PAD],
        [30, 31, 32, 33, 34, PAD, PAD, PAD],
        [PAD] * 8,
    ]
    assert batch.position_ids.tolist() == [
        [0, 1, 2, 3, 0, 1, 0, 1],
        [0, 1, 2, 3, 4, 5, 0, 1],
        [*range(8)],
    ]
    assert batch.labels.tolist() == [
        [[11, 12, 0, 0, 21, 0, 0, 0], [0, 0, 33, 34, 0, 0, 0, 0], [0] * 8],
        [[12, 0, 0, 0, 0, 0, 0, 0], [0, 33, 34, 0, 0, 0, 0, 0], [0] * 8],
    ]
    assert batch.loss_mask.tolist() == (batch.labels > 0).float().tolist()
    assert batch.documents.tolist() == [
        [0, 0, 0, -1, 1, 1, -1, -1],
        [3, 3, 3, 3, 3, -1, -1, -1],
        [-1] * 8,
    ]
    assert batch.bounds.tolist() == [0, 4, 6, 8, 14, 16, 24]
    assert batch.bounds.dtype == torch.int32
    assert batch.lengths.tolist() == [3, 2, 0, 5, 0, 0]
    assert batch.sample_ids == ("one", "two", "three")


@property_test
@given(
    rows=st.lists(st.lists(samples, max_size=4), min_size=1, max_size=3),
    multiple=st.sampled_from([1, 2, 4, 8]),
    num_mtp=st.integers(0, 2),
)
def test_a_packed_document_has_the_targets_that_it_has_alone(rows, multiple, num_mtp):
    batch = pack_batch(rows, row_length=64, multiple=multiple, num_mtp=num_mtp, pad_id=PAD)
    flat = {name: getattr(batch, name).flatten(-2) for name in ("tokens", "labels", "loss_mask")}
    positions, documents = batch.position_ids.flatten(), batch.documents.flatten()
    whole = [one for row in rows for one in row if len(one.tokens)]
    real = [number for number, n in enumerate(batch.lengths.tolist()) if n]
    assert len(real) == len(whole)
    for number, one in zip(real, whole, strict=True):
        where = documents == number
        targets = shift_targets(one, 1 + num_mtp)
        assert flat["tokens"][where].tolist() == one.tokens.tolist()
        assert flat["labels"][:, where].tolist() == targets.labels.tolist()
        assert flat["loss_mask"][:, where].tolist() == targets.loss_mask.tolist()
        assert positions[where].tolist() == [*range(len(one.tokens))]
        start, stop = batch.bounds[number : number + 2].tolist()
        assert where.nonzero()[0].item() == start
        assert (stop - start) % multiple == 0
        assert start + len(one.tokens) <= stop
    assert counted_tokens(batch).sum() == batch.loss_mask.sum()
    assert not batch.loss_mask[:, batch.padding].any()
    assert batch.bounds.diff().min() > 0
    assert all(end in batch.bounds for end in range(64, 64 * len(rows) + 1, 64)), "rows end there"


def test_documents_that_do_not_fit_their_row_are_refused():
    rows = [[sample([5] * 5, [1] * 5, "a"), sample([6] * 3, [1] * 3, "b")]]
    problem = "b: 3 tokens, with the 1 others of its row, don't fit a sequence of 8"
    with pytest.raises(ValueError, match=problem):
        pack_batch(rows, row_length=8, multiple=4, num_mtp=0, pad_id=PAD)


def test_types_are_those_that_the_model_takes():
    batch = make_batch([sample([5, 6], [0, 1])], seq_length=4, num_mtp=2, pad_id=PAD)
    dtypes = {
        "tokens": torch.int64,
        "position_ids": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.float32,
        "padding": torch.bool,
    }
    assert {name: getattr(batch, name).dtype for name in dtypes} == dtypes
    assert batch.labels.shape == batch.loss_mask.shape == (3, 1, 4)
    assert counted_tokens(batch).dtype == np.int64


@property_test
@given(rows=st.lists(samples, min_size=1, max_size=4), num_mtp=st.integers(0, 3))
def test_labels_equal_a_search_token_by_token(rows, num_mtp):
    batch = make_batch(rows, seq_length=9, num_mtp=num_mtp, pad_id=PAD)
    for b, row in enumerate(rows):
        for t in range(9):
            inside = t < len(row.tokens)
            assert batch.tokens[b, t] == (row.tokens[t] if inside else PAD)
            assert batch.padding[b, t] == (not inside)
            for k in range(1 + num_mtp):
                target = t + 1 + k
                counted = target < len(row.tokens) and row.loss[target]
                assert batch.loss_mask[k, b, t] == float(counted)
                assert batch.labels[k, b, t] == (row.tokens[target] if counted else 0)


@property_test
@given(row=samples, num_mtp=st.integers(0, 3))
def test_every_counted_token_is_a_target_once_a_depth_that_reaches_it(row, num_mtp):
    counts = counted_tokens(make_batch([row], seq_length=9, num_mtp=num_mtp, pad_id=PAD))
    assert counts.tolist() == [int(row.loss[1 + k :].sum()) for k in range(1 + num_mtp)]


def test_counts_are_exact_where_float32_is_not():
    mask = torch.ones(1, 1, 1).expand(1, 4097, 4097)
    batch = make_batch([EMPTY_SAMPLE], seq_length=1, num_mtp=0, pad_id=PAD)
    object.__setattr__(batch, "loss_mask", mask)
    assert counted_tokens(batch).tolist() == [4097**2]


def test_an_empty_sample_is_all_padding():
    batch = make_batch([EMPTY_SAMPLE], seq_length=3, num_mtp=1, pad_id=PAD)
    assert batch.tokens.tolist() == [[PAD] * 3]
    assert bool(batch.padding.all())
    assert counted_tokens(batch).tolist() == [0, 0]
    assert batch.sample_ids == ("",)


def test_a_document_shorter_than_the_depths_has_no_targets_there():
    targets = shift_targets(sample([5, 6], [1, 1]), depths=4)
    assert targets.labels.tolist() == [[6, 0], [0, 0], [0, 0], [0, 0]]
    assert targets.loss_mask.tolist() == [[1, 0], [0, 0], [0, 0], [0, 0]]


def test_a_sample_longer_than_the_sequence_is_refused():
    long = sample([5, 6, 7], [0, 1, 1], "a.jsonl:3")
    with pytest.raises(ValueError, match=r"a.jsonl:3: 3 tokens don't fit a sequence of 2"):
        make_batch([long], seq_length=2, num_mtp=0, pad_id=PAD)
