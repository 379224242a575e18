"""Plain-torch modules against torch, transformers, and the real Transformer Engine's names.

`data/te_tiny{,4,8}.json.gz` are measured facts: state-dict names, parameter marks and sharded
state-dict entries of every rank of Megatron-Core 0.19.2's stock `get_gpt_decoder_block_spec` and
`get_gpt_mtp_block_spec` with Transformer Engine 2.20.2, for the model `TINY`, written down from a
process that played the ranks of a world that was not there. The layouts are in `TE_LAYOUTS`.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from megatron_dsv3.config.architecture import DEEPSEEK_V3
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.model import cpu
from megatron_dsv3.model.build import build_chunks
from megatron_dsv3.model.config import DeepseekV3Config, mcore_config
from megatron_dsv3.model.groups import Groups, start, stop
from megatron_dsv3.model.torch_modules import (
    ColumnLinear,
    DuplicatedLinear,
    GroupedColumnLinear,
    GroupedRowLinear,
    NormColumnLinear,
    RMSNorm,
    RowLinear,
)

DATA = Path(__file__).with_name("data")
CPU = torch.device("cpu")
TINY = replace(
    DEEPSEEK_V3, vocab_size=128, hidden_size=64, num_layers=4, num_dense_layers=1, num_heads=4,
    ffn_hidden_size=128, q_lora_rank=24, kv_lora_rank=16, qk_head_dim=16, qk_rope_head_dim=8,
    v_head_dim=16, num_experts=8, num_experts_per_token=2, moe_ffn_hidden_size=32, num_groups=4,
    num_groups_per_token=2,
)  # fmt: skip
TE_LAYOUTS = {
    "te_tiny": (Parallel(), 1),
    "te_tiny4": (Parallel(tp_size=2, ep_size=2), 4),
    "te_tiny8": (Parallel(tp_size=2, pp_size=2, ep_size=2, etp_size=2, stages="Ett|ttmL"), 8),
}


@pytest.fixture
def as_rank() -> Iterator[Callable[[Parallel, int, int], Groups]]:
    """Joins a world that is not there; its collectives do nothing."""
    cpu.enable()
    stop()

    def join(parallel: Parallel, rank: int, world_size: int) -> Groups:
        stop()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        return start(parallel, CPU)

    yield join
    stop()


@pytest.fixture
def groups(as_rank) -> Groups:
    return as_rank(Parallel(), 0, 1)


def _config(dtype: torch.dtype = torch.float32, parallel: Parallel | None = None, **options: Any):
    options = {"perform_initialization": True, **options}
    return mcore_config(TINY, parallel or Parallel(), dtype=dtype, device=CPU, options=options)


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


COMMON = {"init_method": torch.nn.init.normal_, "bias": False, "skip_bias_add": False}


def _linear(cls: type, config: DeepseekV3Config, n_in: int, n_out: int, **options: Any) -> Any:
    options |= {"input_is_parallel": True} if cls is RowLinear else {"gather_output": False}
    return cls(n_in, n_out, config=config, is_expert=False, **COMMON, **options)


def _duplicated(config: DeepseekV3Config, n_in: int, n_out: int) -> DuplicatedLinear:
    return DuplicatedLinear(n_in, n_out, config=config, parallel_mode="duplicated", **COMMON)


# Norms


@pytest.mark.parametrize("epsilon", [1e-6, 1e-3])
def test_the_norm_is_that_of_torch(epsilon):
    norm = RMSNorm(_config(), 48, eps=epsilon)
    norm.weight.data = _random(48, seed=1)
    x, theirs_x = (_random(5, 2, 48).mul(0.02).requires_grad_() for _ in range(2))
    weight = norm.weight.detach().clone().requires_grad_()
    ours, theirs = norm(x), F.rms_norm(theirs_x, (48,), weight, epsilon)
    torch.testing.assert_close(ours, theirs)
    pull = _random(5, 2, 48, seed=2)
    (ours * pull).sum().backward()
    (theirs * pull).sum().backward()
    torch.testing.assert_close(x.grad, theirs_x.grad)
    torch.testing.assert_close(norm.weight.grad, weight.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_norm_rounds_where_transformers_does(dtype):
    """Computed in fp32, rounded, then multiplied: equal to the bit."""
    ours, theirs = RMSNorm(_config(dtype), 64), DeepseekV3RMSNorm(64).to(dtype)
    ours.weight.data = theirs.weight.data = _random(64, seed=1, dtype=dtype)
    x = _random(40, 64, dtype=dtype)
    assert ours(x).dtype is dtype
    assert torch.equal(ours(x), theirs(x))
    if dtype is torch.bfloat16:
        one_rounding = F.rms_norm(x.float(), (64,), ours.weight.float(), 1e-6).to(dtype)
        assert not torch.equal(ours(x), one_rounding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_fused_norm_and_product_are_the_two_one_after_the_other(groups, dtype):
    fused = _linear(NormColumnLinear, _config(dtype), 48, 32)
    fused.layer_norm_weight.data = _random(48, seed=1, dtype=dtype)
    x = _random(7, 2, 48, dtype=dtype)
    norm = DeepseekV3RMSNorm(48, eps=TINY.rms_norm_eps).to(dtype)
    norm.weight.data = fused.layer_norm_weight.data
    output, bias = fused(x)
    assert bias is None
    assert torch.equal(output, F.linear(norm(x), fused.weight))


def test_the_fused_norm_follows_the_configured_epsilon(groups):
    config = replace(_config(), layernorm_epsilon=0.5)
    fused = _linear(NormColumnLinear, config, 8, 8)
    x = _random(3, 1, 8)
    expected = F.linear(F.rms_norm(x, (8,), fused.layer_norm_weight, 0.5), fused.weight)
    torch.testing.assert_close(fused(x)[0], expected)


def test_the_fused_norm_comes_first_as_in_transformer_engine(groups):
    names = [name for name, _ in _linear(NormColumnLinear, _config(), 8, 8).named_parameters()]
    assert names == ["layer_norm_weight", "weight"]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_parameters_that_see_part_of_the_sequence_say_so(as_rank, tp_size):
    """finalize_model_grads sums their gradients over TP; without the mark they are silently off."""
    parallel = Parallel(tp_size=tp_size)
    as_rank(parallel, 0, 2)
    config = _config(parallel=parallel)
    marked = {
        "norm": RMSNorm(config, 8).weight,
        "fused norm": _linear(NormColumnLinear, config, 8, 8).layer_norm_weight,
        "duplicated": _duplicated(config, 8, 8).weight,
    }
    assert {n: w.sequence_parallel for n, w in marked.items()} == dict.fromkeys(marked, tp_size > 1)
    column = _linear(NormColumnLinear, config, 8, 8).weight
    assert not getattr(column, "sequence_parallel", False)
    assert column.tensor_model_parallel


# Linears


def test_the_duplicated_linear_is_a_product(groups):
    linear = _duplicated(_config(), 12, 20)
    x = _random(3, 2, 12)
    assert linear.weight.shape == (20, 12)
    assert linear.weight.abs().max() > 0
    output, bias = linear(x)
    assert bias is None
    assert torch.equal(output, x @ linear.weight.T)


SPLITS = [(3, 2, 4, 1), (0, 5, 0, 5), (10, 0, 0, 0), (0, 0, 0, 10), (0, 0, 0, 0)]


def _grouped(cls: type, pg_collection: Any, *, config: DeepseekV3Config | None = None) -> Any:
    config = config or _config()
    return cls(4, 6, 10, config=config, is_expert=True, pg_collection=pg_collection, **COMMON)


@pytest.mark.parametrize("cls", [GroupedColumnLinear, GroupedRowLinear])
@pytest.mark.parametrize("splits", SPLITS, ids=str)
def test_each_expert_multiplies_its_own_rows(groups, cls, splits):
    linear = _grouped(cls, groups.collection)
    x = _random(sum(splits), 6).requires_grad_()
    output, bias = linear(x, list(splits))
    assert bias is None
    assert output.shape == (sum(splits), 10)
    owners = torch.arange(4).repeat_interleave(torch.tensor(splits))
    stacked = torch.stack([getattr(linear, f"weight{e}") for e in range(4)])
    by_token = torch.einsum("ti,toi->to", x, stacked[owners])
    torch.testing.assert_close(output, by_token)
    parameters = [getattr(linear, f"weight{e}") for e in range(4)]
    ours = torch.autograd.grad(output.square().sum(), [x, *parameters])
    theirs = torch.autograd.grad(by_token.square().sum(), [x, *parameters])
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference)


def test_an_expert_without_tokens_still_has_a_gradient_of_zero(groups):
    """A missing one would leave the optimizer's bucket waiting."""
    linear = _grouped(GroupedColumnLinear, groups.collection)
    linear(_random(5, 6), [5, 0, 0, 0])[0].sum().backward()
    assert linear.weight0.grad.any()
    assert [getattr(linear, f"weight{e}").grad.any().item() for e in (1, 2, 3)] == [False] * 3


@pytest.mark.parametrize(
    ("cls", "shape", "split_dim"),
    [(GroupedColumnLinear, (5, 6), 0), (GroupedRowLinear, (10, 3), 1)],
)
def test_split_experts_hold_their_part_and_say_which(as_rank, cls, shape, split_dim):
    parallel = Parallel(etp_size=2)
    groups = as_rank(parallel, 1, 2)
    weight = _grouped(cls, groups.collection, config=_config(parallel=parallel)).weight2
    assert tuple(weight.shape) == shape
    marks = (weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride)
    assert marks == (True, split_dim, 1)


@pytest.mark.parametrize(
    ("parallel", "own_group"),
    [
        (Parallel(), False),
        (Parallel(tp_size=2, etp_size=2), False),
        (Parallel(ep_size=2), True),
        (Parallel(tp_size=2), True),
    ],
    ids=str,
)
def test_spread_experts_are_reduced_apart_from_the_rest(as_rank, parallel, own_group):
    groups = as_rank(parallel, 0, 2)
    linear = _grouped(GroupedColumnLinear, groups.collection, config=_config(parallel=parallel))
    assert {w.allreduce for w in linear.parameters()} == {not own_group}


def test_initialization_of_experts_takes_the_experts_random_state(as_rank):
    def first_weights(rank: int) -> Tensor:
        parallel = Parallel(ep_size=2)
        groups = as_rank(parallel, rank, 2)
        linear = _grouped(GroupedColumnLinear, groups.collection, config=_config(parallel=parallel))
        return torch.stack([w.detach().clone() for w in linear.parameters()])

    first, again, other = first_weights(0), first_weights(0), first_weights(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


# Extra states


MODULES: dict[str, Callable[[Groups], torch.nn.Module]] = {
    "RMSNorm": lambda _: RMSNorm(_config(), 8),
    "ColumnLinear": lambda _: _linear(ColumnLinear, _config(), 8, 8),
    "RowLinear": lambda _: _linear(RowLinear, _config(), 8, 8),
    "NormColumnLinear": lambda _: _linear(NormColumnLinear, _config(), 8, 8),
    "DuplicatedLinear": lambda _: _duplicated(_config(), 8, 8),
    "GroupedColumnLinear": lambda groups: _grouped(GroupedColumnLinear, groups.collection),
    "GroupedRowLinear": lambda groups: _grouped(GroupedRowLinear, groups.collection),
}
each_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())


@each_module
def test_an_extra_state_is_saved_empty_and_ignored_on_load(groups, make):
    model = torch.nn.ModuleDict({"inner": make(groups)})
    state = model.state_dict()
    extra = [key for key in state if key.endswith("_extra_state")]
    assert extra == ["inner._extra_state"]
    assert (state[extra[0]].dtype, state[extra[0]].numel()) == (torch.uint8, 0)
    fp8 = torch.arange(9, dtype=torch.uint8)
    for accepted in ({**state, extra[0]: fp8}, {k: v for k, v in state.items() if k not in extra}):
        fresh = torch.nn.ModuleDict({"inner": make(groups)})
        given = dict(accepted)
        fresh.load_state_dict(given, strict=True)
        assert given.keys() == accepted.keys(), "the caller's dict is left alone"
        for key, value in fresh.state_dict().items():
            assert torch.equal(value, state[key]), key


@each_module
def test_a_strict_load_still_sees_a_missing_and_a_surplus_weight(groups, make):
    module = make(groups)
    state = module.state_dict()
    weight = next(key for key in state if "weight" in key)
    lacking = {k: v for k, v in state.items() if k != weight}
    with pytest.raises(RuntimeError, match=f"Missing key.*{weight}"):
        module.load_state_dict(lacking, strict=True)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*surprise"):
        module.load_state_dict({**state, "surprise": torch.zeros(1)}, strict=True)


def test_the_numbered_extra_states_of_a_sharded_checkpoint_are_accepted(groups):
    linear = _grouped(GroupedColumnLinear, groups.collection)
    numbered = {f"_extra_state{e}": torch.empty(0, dtype=torch.uint8) for e in (1, 2, 3)}
    linear.load_state_dict({**linear.state_dict(), **numbered}, strict=True)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*_extra_state4"):
        linear.load_state_dict(
            {**linear.state_dict(), "_extra_state4": torch.empty(0)}, strict=True
        )


# Against Transformer Engine's names


def _shards(value: Any) -> list[Any]:
    """The sharded tensors and objects of one entry, in order."""
    if isinstance(value, ShardedTensorFactory):
        value = value.build()
    if isinstance(value, dict):
        value = list(value.values())
    return [x for y in value for x in _shards(y)] if isinstance(value, list | tuple) else [value]


def _describe(shard: ShardedTensor | ShardedObject) -> list[Any]:
    is_tensor = isinstance(shard, ShardedTensor)
    return [
        "T" if is_tensor else "O",
        shard.key if is_tensor else shard.unique_key,
        list(shard.global_shape),
        list(shard.global_offset),
        list(shard.local_shape) if is_tensor else None,
        list(shard.replica_id),
        str(shard.dtype) if is_tensor else repr(shard.data)[:40],
    ]


def _state(model: torch.nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, None if value is None else [list(value.shape), str(value.dtype)])
        for name, value in model.state_dict().items()
    ]


def _marks(model: torch.nn.Module) -> list[tuple[str, list[Any]]]:
    defaults = {
        "allreduce": True,
        "tensor_model_parallel": False,
        "partition_dim": -1,
        "sequence_parallel": False,
    }
    return [
        (n, [str(p.device), *(getattr(p, mark, d) for mark, d in defaults.items())])
        for n, p in model.named_parameters()
    ]


@pytest.mark.parametrize("name", TE_LAYOUTS)
def test_names_shapes_marks_and_shards_are_those_of_transformer_engine(as_rank, name):
    """State dicts in the same order; sharded entries with key, offset, replica and data type."""
    with gzip.open(DATA / f"{name}.json.gz") as file:
        facts = json.load(file)
    parallel, world_size = TE_LAYOUTS[name]
    for rank in range(world_size):
        groups = as_rank(parallel, rank, world_size)
        (model,) = build_chunks(
            TINY,
            parallel,
            groups,
            _config(parallel=parallel),
            max_seq_length=64,
            transformer_engine=False,
        )
        assert _state(model) == list(facts["state"][str(rank)].items())
        assert _marks(model) == list(facts["attr"][str(rank)].items())
        metadata = {
            "singleton_local_shards": False,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        sharded = model.sharded_state_dict(metadata=metadata)
        ours = {key: [_describe(shard) for shard in _shards(v)] for key, v in sharded.items()}
        assert ours == facts["shard"][str(rank)]
