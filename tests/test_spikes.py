"""Which losses are spikes, and when leaving steps out ends the run."""

import math

import pytest

from megatron_dsv3.config.sections import SpikesSection
from megatron_dsv3.train.spikes import NonFiniteError, SpikeError, SpikeGuard


def _guard(**settings) -> SpikeGuard:
    return SpikeGuard(SpikesSection(**settings))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_always_a_spike(loss):
    assert _guard().explain(loss) == f"loss is {loss}"


def test_without_a_factor_any_finite_loss_is_fine():
    guard = _guard(window=2)
    for loss in (1.0, 1.0, 1e9):
        assert guard.explain(loss) is None
        guard.keep(loss)


def test_a_loss_is_measured_at_the_median_of_the_window():
    guard = _guard(factor=2.0, window=3)
    for loss in (1.0, 9.0, 2.0):  # median 2; while the window fills nothing is a spike
        assert guard.explain(loss) is None
        guard.keep(loss)
    assert guard.explain(4.0) is None
    assert guard.explain(4.01) == "loss 4.0100 is more than 2.0 times the median 2.0000"
    guard.keep(8.0)  # the oldest, 1.0, is out of the window: median 8
    assert guard.explain(15.9) is None


def test_stop_raises_the_reason():
    with pytest.raises(SpikeError, match="far above"):
        _guard(action="stop").skip(SpikeError("far above"))


def test_skip_counts_and_gives_up_after_too_many_in_a_row():
    guard = _guard(action="skip", max_skipped=3)
    for _ in range(2):
        guard.skip(NonFiniteError("loss is nan"))
    guard.keep(1.0)  # a step that was done ends the row
    for _ in range(2):
        guard.skip(NonFiniteError("loss is nan"))
    assert guard.num_skipped == 4
    with pytest.raises(NonFiniteError, match="loss is nan; 3 steps in a row were skipped"):
        guard.skip(NonFiniteError("loss is nan"))
