"""Masters in halves: joined and split without losing a bit."""

from types import SimpleNamespace

import torch

from megatron_dsv3.train.remainders import join, keep_masters_whole, remainder_of, split


def _every_kind_of_float() -> torch.Tensor:
    """Random bits that are finite, zeros, ties, and the neighbours of powers of two."""
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), dtype=torch.int32)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.0 + 2**-8, 1.0 - 2**-24, 3.0e38, 1e-40])
    floats = torch.cat([bits.view(torch.float32), special])
    ties = (bits[:1000] & -65536) | 0x8000
    floats = torch.cat([floats, ties.view(torch.float32)])
    return floats[floats.isfinite() & (floats.abs() < 3.3e38)]


def test_a_split_master_is_joined_to_the_same_bits():
    masters = _every_kind_of_float()
    weight, remainder = split(masters)
    assert weight.dtype is torch.bfloat16
    assert remainder.dtype is torch.int16
    assert torch.equal(join(weight, remainder).view(torch.int32), masters.view(torch.int32))


def test_the_weight_is_the_nearest_bf16_to_its_master():
    masters = _every_kind_of_float()
    weight, _ = split(masters)
    nearest = masters.bfloat16()
    tie = (masters.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weight[~tie], nearest[~tie])
    # Half-way up in magnitude, as FusedAdam rounds; torch rounds to even.
    assert bool((weight[tie].abs() >= nearest[tie].abs()).all())


def test_the_remainder_of_a_weight_that_torch_rounded_is_exact_but_in_ties():
    masters = _every_kind_of_float()
    weight = masters.bfloat16()
    remainder = remainder_of(masters, weight)
    assert remainder is not None
    apart = join(weight, remainder).view(torch.int32) != masters.view(torch.int32)
    tie = (masters.view(torch.int32) & 0xFFFF) == 0x8000
    assert not bool((apart & ~tie).any())
    off = (join(weight, remainder).view(torch.int32) - masters.view(torch.int32)).abs()
    assert int(off.max()) == 1


def test_a_weight_that_is_no_rounding_of_the_master_has_no_remainder():
    assert (
        remainder_of(torch.tensor([1.0]), torch.tensor([1.0078125], dtype=torch.bfloat16)) is None
    )


def _part(weight: torch.Tensor, remainder: torch.Tensor) -> SimpleNamespace:
    """A distributed optimizer of one parameter, as Megatron-Core's gives and takes states."""
    state = {"param": remainder, "exp_avg": torch.ones_like(weight, dtype=torch.float32)}

    def put(_parameter: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        assert tensors["param"].dtype is torch.int16  # as FusedAdam asserts it
        state.update(tensors)

    optimizer = SimpleNamespace(store_param_remainders=True, param_groups=[{"params": [weight]}])
    return SimpleNamespace(
        optimizer=optimizer,
        model_param_group_index_map={weight: (0, 0)},
        _get_main_param_and_optimizer_states=lambda _parameter: dict(state),
        _set_main_param_and_optimizer_states=put,
    )


def test_checkpoints_get_and_put_whole_masters():
    masters = torch.randn(1000)
    weight, remainder = split(masters)
    part = _part(weight, remainder)
    keep_masters_whole(part)
    assert torch.equal(part._get_main_param_and_optimizer_states(weight)["param"], masters)
    other = masters * (1 + 2**-20)
    part._set_main_param_and_optimizer_states(weight, {"param": other})
    assert torch.equal(part._get_main_param_and_optimizer_states(weight)["param"], other)


def test_masters_of_other_weights_bring_their_own():
    """As from a run whose weights were kept in FP8: its masters know more than its weights."""
    weight, remainder = split(torch.randn(100))
    part = _part(weight, remainder)
    keep_masters_whole(part)
    other = torch.randn(100)
    part._set_main_param_and_optimizer_states(weight, {"param": other})
    assert torch.equal(part._get_main_param_and_optimizer_states(weight)["param"], other)
    assert torch.equal(weight, split(other)[0])


def test_an_optimizer_with_fp32_masters_is_left_alone():
    weight, remainder = split(torch.randn(10))
    part = _part(weight, remainder)
    part.optimizer.store_param_remainders = False
    before = dict(vars(part))
    keep_masters_whole(part)
    assert vars(part) == before
