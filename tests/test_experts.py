"""Expert loads and the bias policy on one process, by hand and against Megatron-Core's own rule."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias

from megatron_dsv3.config.sections import ExpertsSection
from megatron_dsv3.model.groups import Groups
from megatron_dsv3.train.experts import ExpertBalance

LOADS = torch.tensor([[4.0, 0.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0], [8.0, 0.0, 0.0, 0.0]])


def _router(number: int, loads: torch.Tensor, *, is_mtp: bool = False, trains: bool = True):
    generator = torch.Generator().manual_seed(number)
    return SimpleNamespace(
        layer_number=number,
        is_mtp_layer=is_mtp,
        config=SimpleNamespace(num_layers=5),
        expert_bias=torch.randn(4, generator=generator),
        local_tokens_per_expert=loads.clone(),
        weight=SimpleNamespace(requires_grad=trains),
        frozen_expert_bias=False,
    )


def _balance(groups: Groups, **section) -> ExpertBalance:
    routers = [
        _router(2, LOADS[0]),
        _router(4, LOADS[1]),
        _router(1, LOADS[2], is_mtp=True, trains=False),
    ]
    balance = ExpertBalance(routers, groups, ExpertsSection(**section))
    balance.read()
    for router in routers:
        router.local_tokens_per_expert.zero_()  # as Megatron-Core does after its reduction
    balance.reduce()
    return balance


def test_loads_are_kept_by_global_layer_mtp_last(groups):
    assert _balance(groups).loads() == {1: [4, 0, 1, 3], 3: [2, 2, 2, 2], 5: [8, 0, 0, 0]}


def test_the_ratio_is_the_mean_over_layers_of_largest_over_mean(groups):
    assert _balance(groups).ratio().item() == pytest.approx((4 / 2 + 2 / 2 + 8 / 2) / 3)


def test_freeze_moves_nothing(groups):
    balance = _balance(groups)
    balance.update_biases(1.0)
    assert balance.drift() == {1: 0, 3: 0, 5: 0}


@pytest.mark.parametrize(
    ("bias", "fraction", "rate"), [("update", 0.25, 0.01), ("decay", 0.25, 0.0025)]
)
def test_biases_move_as_megatron_cores_rule_says(groups, bias, fraction, rate):
    balance = _balance(groups, bias=bias, bias_update_rate=0.01)
    before = [router.expert_bias.clone() for router in balance.routers]
    balance.update_biases(fraction)
    for router, old, loads in zip(balance.routers[:2], before, LOADS, strict=False):
        expected = get_updated_expert_bias(loads[None], old[None], rate)[0]
        torch.testing.assert_close(router.expert_bias, expected)
    assert torch.equal(balance.routers[2].expert_bias, before[2]), "a frozen MTP layer's bias moved"
    assert balance.drift() == pytest.approx({1: rate, 3: 0, 5: 0}, abs=1e-7)


def test_megatron_cores_own_update_is_off(groups):
    assert all(router.frozen_expert_bias for router in _balance(groups).routers)


def test_a_rounded_bias_is_noticed(groups):
    balance = _balance(groups)
    balance.check()
    balance.routers[1].expert_bias = balance.routers[1].expert_bias.bfloat16()
    with pytest.raises(AssertionError, match="layer 3: expert bias or counter"):
        balance.check()
