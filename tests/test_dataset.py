import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_cases import write_store

from megatron_dsv3.data.dataset import (
    Position,
    RowOptions,
    Rows,
    global_batches,
    rank_micro_batches,
)
from megatron_dsv3.data.packing import shuffled
from megatron_dsv3.data.store import Store

property_test = settings(max_examples=100, deadline=None, derandomize=True, database=None)


# ---- Rows ---------------------------------------------------------------------------------------

# Tokens, and the spans that count.
SAMPLES = [
    ([1, 2, 3, 4, 5], [[3, 5]]),
    ([6, 7, 8], [[1, 3]]),
    ([9] * 12, [[2, 4], [6, 11]]),
    ([10, 11], [[1, 2]]),
    ([12] * 9, [[8, 9]]),
]


@pytest.fixture
def store(tmp_path):
    return Store(write_store(tmp_path / "store", SAMPLES))


def tokens_by_row(rows):
    return sorted(sorted(s.tokens.tolist() for s in rows[i]) for i in range(len(rows)))


def test_rows_hold_whole_samples_with_their_masks(store):
    rows = Rows(store, RowOptions(length=16, multiple=2))
    found = {sample.id: sample for i in range(len(rows)) for sample in rows[i]}
    assert sorted(found) == [f"s:{i}" for i in range(5)]
    for i, (tokens, spans) in enumerate(SAMPLES):
        assert found[f"s:{i}"].tokens.tolist() == tokens
        counted = [n for start, end in spans for n in range(start, end)]
        assert np.flatnonzero(found[f"s:{i}"].loss).tolist() == counted
    # 12 + 4, 10 + 6, 2: the three would fit no two rows.
    assert len(rows) == 3
    assert rows.report.fill == pytest.approx(31 / 48)
    assert (rows.report.samples, rows.report.tokens) == (5, 31)
    assert rows.report.counted_tokens == store.manifest.num_counted == 13


def test_unpacked_rows_hold_one_sample_each_in_order(store):
    rows = Rows(store, RowOptions(length=16, packed=False))
    assert [[sample.id for sample in rows[i]] for i in range(5)] == [[f"s:{i}"] for i in range(5)]
    assert rows.report.fill == pytest.approx(31 / 80)


def test_a_long_sample_is_dropped_and_counted(store):
    rows = Rows(store, RowOptions(length=8))
    report = rows.report
    assert (report.samples, report.too_long, report.truncated, report.without_counted) == (
        *(3, 2, 0, 0),
    )
    assert (report.tokens, report.lost_tokens) == (10, 21)
    assert report.counted_tokens == 2 + 2 + 1
    assert tokens_by_row(rows) == [[[1, 2, 3, 4, 5], [6, 7, 8]], [[10, 11]]]


def test_a_long_sample_is_cut_where_something_counted_is_left(store):
    rows = Rows(store, RowOptions(length=8, too_long="truncate"))
    report = rows.report
    assert (report.samples, report.too_long, report.truncated, report.without_counted) == (
        *(4, 0, 1, 1),
    )
    assert (report.tokens, report.lost_tokens) == (18, 13)
    assert report.counted_tokens == 2 + 2 + (2 + 2) + 1
    [cut] = [sample for i in range(len(rows)) for sample in rows[i] if sample.id == "s:2"]
    assert cut.tokens.tolist() == [9] * 8
    assert np.flatnonzero(cut.loss).tolist() == [2, 3, 6, 7]


def test_a_long_sample_is_an_error_where_that_is_asked_for(store):
    problem = "s:2: 12 tokens, but the sequence length is 8; raise it, or drop or truncate"
    with pytest.raises(ValueError, match=problem):
        Rows(store, RowOptions(length=8, too_long="error"))


def test_a_sample_as_long_as_a_row_fits(store):
    assert Rows(store, RowOptions(length=12, too_long="error")).report.samples == 5


def test_a_store_of_which_nothing_is_left_is_an_error(store):
    problem = r"store: no sample left of 5: 5 longer than 1 tokens, 0 with no .* raise the sequence"
    with pytest.raises(ValueError, match=problem):
        Rows(store, RowOptions(length=1))
    with pytest.raises(ValueError, match=r"of 5: 0 longer than 1 tokens, 5 with no counted"):
        Rows(store, RowOptions(length=1, too_long="truncate"))


def test_a_fingerprint_tells_rows_of_other_content_or_order(store, tmp_path):
    options = {"length": 16, "multiple": 2}
    same = Store(write_store(tmp_path / "same", SAMPLES))
    other = Store(write_store(tmp_path / "other", [*SAMPLES[:4], ([12] * 8 + [13], [[8, 9]])]))
    uncounted = Store(write_store(tmp_path / "mask", [*SAMPLES[:4], ([12] * 9, [[7, 9]])]))
    one = Rows(store, RowOptions(**options)).fingerprint
    assert Rows(same, RowOptions(**options)).fingerprint == one
    others = [
        Rows(other, RowOptions(**options)),
        Rows(uncounted, RowOptions(**options)),
        Rows(store, RowOptions(**{**options, "length": 18})),
        Rows(store, RowOptions(**{**options, "multiple": 1})),
        Rows(store, RowOptions(**options, packed=False)),
    ]
    assert len({one, *(rows.fingerprint for rows in others)}) == 6


# ---- Order and position -------------------------------------------------------------------------


@property_test
@given(
    num_rows=st.integers(1, 13),
    global_batch_size=st.integers(1, 17),
    num_epochs=st.integers(1, 4),
)
def test_a_run_sees_every_row_once_an_epoch(num_rows, global_batch_size, num_epochs):
    batches = list(
        global_batches(num_rows, global_batch_size=global_batch_size, seed=3, num_epochs=num_epochs)
    )
    assert all(len(batch.rows) == global_batch_size for batch in batches)
    flat = [row for batch in batches for row in batch.rows]
    orders = [shuffled(num_rows, seed=3, epoch=epoch).tolist() for epoch in range(num_epochs)]
    num_seen = num_rows * num_epochs
    assert flat[:num_seen] == [row for order in orders for row in order]
    assert set(flat[num_seen:]) <= {None}
    assert len(flat) - num_seen < global_batch_size
    assert batches[-1].after == Position(num_epochs, 0)


@property_test
@given(
    num_rows=st.integers(1, 13),
    global_batch_size=st.integers(1, 17),
    data=st.data(),
)
def test_a_run_resumed_goes_on_as_if_never_stopped(num_rows, global_batch_size, data):
    options = {"global_batch_size": global_batch_size, "seed": 5, "num_epochs": 4}
    whole = list(global_batches(num_rows, **options))
    stop = data.draw(st.integers(0, len(whole) - 1))
    assert (
        list(global_batches(num_rows, position=whole[stop].after, **options)) == (whole[stop + 1 :])
    )


def test_without_a_number_of_epochs_batches_never_end():
    batches = global_batches(3, global_batch_size=2, seed=0)
    seen = [next(batches) for _ in range(5)]
    assert [batch.after for batch in seen] == [
        Position(0, 2),
        Position(1, 1),
        Position(2, 0),
        Position(2, 2),
        Position(3, 1),
    ]


@pytest.mark.parametrize(("num_rows", "sample"), [(3, 3), (3, -1), (0, 0)])
def test_a_position_outside_the_data_is_refused(num_rows, sample):
    batches = global_batches(num_rows, global_batch_size=2, seed=0, position=Position(1, sample))
    problem = f"position: row {sample} of an epoch of {num_rows}; are these the data"
    with pytest.raises(ValueError, match=problem):
        next(batches)


# ---- Ranks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dp_size", [1, 2, 3, 6])
def test_ranks_share_the_same_micro_batches_at_every_size(dp_size):
    of_rank = [
        rank_micro_batches(range(12), micro_batch_size=2, dp_rank=rank, dp_size=dp_size)
        for rank in range(dp_size)
    ]
    # Card by card: the first of every rank, the second of every rank, ...
    dealt = [batch for deal in zip(*of_rank, strict=True) for batch in deal]
    assert dealt == [[2 * k, 2 * k + 1] for k in range(6)]


def test_sizes_that_do_not_divide_are_shown():
    problem = (
        r"global_batch_size \(10\) must be a multiple of micro_batch_size \(2\) \* dp \(3\) = 6"
    )
    with pytest.raises(ValueError, match=problem):
        rank_micro_batches(range(10), micro_batch_size=2, dp_rank=0, dp_size=3)
