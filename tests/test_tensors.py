"""Splitting and joining against hand-written numbers and transformers' own feed-forward."""

from dataclasses import replace

import hf_reference
import pytest
import torch
import torch.nn.functional as F
from test_mapping import SMALL

from megatron_dsv3.convert.mapping import Param, by_mcore_name, expand
from megatron_dsv3.convert.tensors import (
    from_shards,
    hf_slices,
    join,
    pieces_of,
    shard_shape,
    to_shard,
)

VARIANTS = (SMALL, replace(SMALL, q_lora_rank=None), replace(SMALL, tie_embeddings=True))
FC1 = by_mcore_name(SMALL)["decoder.layers.0.mlp.linear_fc1.weight"]
FC2 = by_mcore_name(SMALL)["decoder.layers.0.mlp.linear_fc2.weight"]
NORM = by_mcore_name(SMALL)["decoder.final_layernorm.weight"]


def whole(param: Param) -> list[torch.Tensor]:
    return [torch.randn(param.hf_shape) for _ in param.hf]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_round_trip_is_bitwise(size):
    for param in (param for arch in VARIANTS for param in expand(arch)):
        parts = whole(param)
        shards = [to_shard(param, parts, rank, size) for rank in range(size)]
        assert {tuple(shard.shape) for shard in shards} == {shard_shape(param, size)}
        for name, before, after in zip(param.hf, parts, from_shards(param, shards), strict=True):
            assert torch.equal(before, after), name


def test_each_rank_of_two_holds_its_half_of_gate_then_its_half_of_up():
    fc1 = replace(FC1, hf_shape=(4, 1))
    gate, up = torch.tensor([[1.0], [2], [3], [4]]), torch.tensor([[5.0], [6], [7], [8]])
    shards = [to_shard(fc1, [gate, up], rank, 2) for rank in range(2)]
    assert [shard.flatten().tolist() for shard in shards] == [[1, 2, 5, 6], [3, 4, 7, 8]]


def test_each_rank_of_two_holds_half_of_the_input_features_of_a_row_parallel_linear():
    fc2 = replace(FC2, hf_shape=(2, 4))
    down = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    assert to_shard(fc2, [down], 0, 2).tolist() == [[1, 2], [5, 6]]
    assert to_shard(fc2, [down], 1, 2).tolist() == [[3, 4], [7, 8]]


def test_what_is_not_split_is_whole_on_every_rank():
    [weight] = whole(NORM)
    assert all(torch.equal(to_shard(NORM, [weight], rank, 4), weight) for rank in range(4))


@pytest.mark.parametrize("swapped", [False, True])
def test_the_ranks_of_a_gated_linear_unit_add_up_to_transformers_output(swapped):
    mlp = hf_reference.build().model.model.layers[0].mlp.double()
    fc1, fc2 = replace(FC1, hf_shape=(128, 64)), replace(FC2, hf_shape=(64, 128))
    gate_up = [mlp.gate_proj.weight, mlp.up_proj.weight]
    parts = gate_up[::-1] if swapped else gate_up
    tokens = torch.randn(5, 64, dtype=torch.float64)
    total = torch.zeros_like(tokens)
    for rank in range(4):
        gate, up = (tokens @ to_shard(fc1, parts, rank, 4).T).chunk(2, -1)
        total += (F.silu(gate) * up) @ to_shard(fc2, [mlp.down_proj.weight], rank, 4).T
    assert torch.allclose(total, mlp(tokens), rtol=1e-12) != swapped


@pytest.mark.parametrize("size", [1, 2, 4])
def test_reading_only_its_slices_gives_a_rank_the_same_shard(size):
    for param in expand(SMALL):
        parts = dict(zip(param.hf, whole(param), strict=True))
        for rank in range(size):
            cuts = hf_slices(param, rank, size)
            pieces = [parts[cut.name][cut.slices] for cut in cuts]
            expected = to_shard(param, list(parts.values()), rank, size)
            assert torch.equal(join(param, pieces, size), expected), param.mcore


def test_slices_say_what_to_read():
    [gate, up] = hf_slices(FC1, 1, 2)
    assert (gate.name, gate.dim, gate.start, gate.stop) == (FC1.hf[0], 0, 12, 24)
    assert (up.name, up.slices) == (FC1.hf[1], (slice(12, 24),))
    assert hf_slices(FC2, 0, 2)[0].slices == (slice(None), slice(0, 12))
    assert hf_slices(NORM, 3, 4)[0].slices == (slice(0, 16),)


def test_pieces_of_a_shard_are_views_of_it():
    shard = torch.zeros(shard_shape(FC1, 2))
    parts = whole(FC1)
    for view, part in zip(pieces_of(FC1, shard, 2), parts, strict=True):
        view.copy_(part[:12])
    assert torch.equal(shard, to_shard(FC1, parts, 0, 2))


def test_wrong_shapes_are_named():
    good, bad = torch.zeros(FC1.hf_shape), torch.zeros(24, 15)
    name = FC1.hf[1].replace(".", r"\.")
    with pytest.raises(ValueError, match=rf"{name}: expected shape \[24, 16\], got \[24, 15\]"):
        to_shard(FC1, [good, bad], 0, 1)
    longer = torch.zeros(25, 16)  # its first half has the right shape
    with pytest.raises(ValueError, match=rf"{name}: expected shape \[24, 16\], got \[25, 16\]"):
        to_shard(FC1, [good, longer], 0, 2)
    with pytest.raises(ValueError, match=rf"{name}: expected shape \[12, 16\], got \[24, 16\]"):
        join(FC1, [good[:12], good], 2)
    with pytest.raises(ValueError, match=r"linear_fc1\.weight: expected shape \[24, 16\]"):
        from_shards(FC1, [torch.zeros(24, 16), torch.zeros(23, 16)])


def test_a_part_too_few_or_too_many_is_refused():
    part = torch.zeros(FC1.hf_shape)
    for parts in ([part], [part] * 3):
        with pytest.raises(ValueError, match="zip"):
            to_shard(FC1, parts, 0, 1)


def test_sizes_that_do_not_divide_are_named_with_the_way_out():
    with pytest.raises(ValueError, match=r"gate_proj\.weight: dim 0 of \[24, 16\] .* 5 equal.*24"):
        to_shard(FC1, whole(FC1), 0, 5)
    with pytest.raises(ValueError, match="rank 2 is not one of 2 ranks"):
        hf_slices(FC1, 2, 2)
    assert to_shard(NORM, whole(NORM), 4, 5).shape == (16,)
