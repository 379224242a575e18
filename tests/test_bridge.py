"""The table against real models of the full 671B, on the meta device, as ranks of a big world."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_dsv3.config.architecture import DEEPSEEK_V3, Architecture
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.convert.bridge import Bridge
from megatron_dsv3.convert.mapping import by_mcore_name
from megatron_dsv3.convert.tensors import shard_shape
from megatron_dsv3.model import cpu
from megatron_dsv3.model.build import build_chunks
from megatron_dsv3.model.config import mcore_config
from megatron_dsv3.model.groups import SharedError, raise_together, start, stop

SMALL = replace(
    DEEPSEEK_V3, vocab_size=256, hidden_size=64, num_layers=4, num_dense_layers=1, num_heads=8,
    ffn_hidden_size=128, moe_ffn_hidden_size=64, q_lora_rank=32, kv_lora_rank=16, qk_head_dim=16,
    qk_rope_head_dim=8, v_head_dim=16, num_experts=16, num_mtp_layers=2,
)  # fmt: skip
V3_LAYOUTS = {
    "alone": (Parallel(), 1, [0]),
    "PP8 EP32": (Parallel(pp_size=8, ep_size=32), 256, [0, 37, 128, 255]),
    "TP8 PP4 VPP4 EP8 ETP2": (
        Parallel(tp_size=8, pp_size=4, vpp_size=4, ep_size=8, etp_size=2),
        64,
        [0, 21, 63],
    ),
}


@pytest.fixture
def as_rank() -> Iterator[Callable[..., Bridge]]:
    """Builds the chunks of one rank of a world that is not there."""
    cpu.enable()
    stop()

    def build(
        arch: Architecture,
        parallel: Parallel,
        rank: int,
        world_size: int,
        *,
        transformer_engine: bool = False,
        meta: bool = True,
        options: dict | None = None,
    ) -> Bridge:
        if dist.is_initialized():
            stop()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        groups = start(parallel, torch.device("cpu"))
        config = mcore_config(
            arch, parallel, dtype=torch.bfloat16, device=groups.device, options=options
        )
        chunks = build_chunks(
            arch,
            parallel,
            groups,
            config,
            max_seq_length=4096,
            transformer_engine=transformer_engine,
            meta=meta,
        )
        return Bridge(chunks, arch, parallel, groups)

    yield build
    stop()


def _shard_size(bridge: Bridge, param) -> int:
    if param.shard.value is None:
        return 1
    return bridge.parallel.etp_size if param.is_expert else bridge.parallel.tp_size


@pytest.mark.slow
@pytest.mark.parametrize("layout", V3_LAYOUTS.values(), ids=V3_LAYOUTS.keys())
def test_the_table_names_and_shapes_every_tensor_of_the_671b(as_rank, layout):
    parallel, world_size, ranks = layout
    for rank in ranks:
        bridge = as_rank(DEEPSEEK_V3, parallel, rank, world_size)
        for param, tensor in bridge.local_tensors():
            assert tensor.is_meta or param.is_buffer  # routers name a device for their buffers
            expected = shard_shape(param, _shard_size(bridge, param))
            assert tuple(tensor.shape) == expected, (rank, param.mcore)


@pytest.mark.slow
def test_one_rank_alone_holds_the_whole_671b(as_rank):
    bridge = as_rank(DEEPSEEK_V3, Parallel(), 0, 1)
    held = {param.mcore: tensor for param, tensor in bridge.local_tensors()}
    assert held.keys() == by_mcore_name(DEEPSEEK_V3).keys()
    numbers = {"main": 0, "mtp": 0}
    for name, tensor in held.items():
        if not name.endswith("expert_bias"):
            numbers["mtp" if name.startswith("mtp.") else "main"] += tensor.numel()
    assert numbers == {"main": 671_026_404_352, "mtp": 11_610_067_968}


@pytest.mark.parametrize(
    "parallel",
    [
        Parallel(tp_size=2, pp_size=2, ep_size=2),
        Parallel(tp_size=2, pp_size=2, vpp_size=2, ep_size=4),
        Parallel(pp_size=4, stages="Ettt|t|-|mmL"),
        Parallel(pp_size=4, stages="Ett|tt|mm|L"),
        Parallel(etp_size=2, ep_size=2, pp_size=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("arch", [SMALL, replace(SMALL, tie_embeddings=True)], ids=["", "tied"])
def test_the_ranks_of_a_layout_hold_every_part_of_every_parameter(as_rank, arch, parallel):
    parts: dict[str, set[tuple[int, int]]] = {}
    for rank in range(8):
        bridge = as_rank(arch, parallel, rank, 8)
        groups = bridge.groups
        for param, tensor in bridge.local_tensors():
            size = _shard_size(bridge, param)
            assert tuple(tensor.shape) == shard_shape(param, size)
            whole = size == 1
            part = 0 if whole else groups.etp_rank if param.is_expert else groups.tp_rank
            parts.setdefault(param.mcore, set()).add((part, size))
    assert parts.keys() == by_mcore_name(arch).keys()
    assert all(len(found) == next(iter(found))[1] for found in parts.values())


def test_a_parameter_without_a_row_and_a_row_without_its_parameter_are_named(as_rank):
    bridge = as_rank(SMALL, Parallel(), 0, 1)
    layer = bridge.chunks[0].decoder.layers[0]
    layer.register_parameter("surprise", torch.nn.Parameter(torch.zeros(1)))
    del layer.mlp.linear_fc2
    unmapped = r"no row for \['decoder.layers.0.surprise'\]"
    missing = r"no parameter for \['decoder.layers.0.mlp.linear_fc2.weight'\]"
    with pytest.raises(ValueError, match=f"{unmapped}, {missing}"):
        bridge.local_tensors()


META = {
    "init_model_with_meta_device": True,
    "use_cpu_initialization": False,
    "perform_initialization": False,
}
MARKS = {
    "allreduce": True,
    "tensor_model_parallel": False,
    "partition_dim": -1,
    "sequence_parallel": False,
}
"""What Megatron-Core's reductions look for on a parameter, and take where it is not there."""


@pytest.mark.parametrize("meta", [True, False], ids=["on meta", "with marks"])
@pytest.mark.parametrize("arch", [SMALL, replace(SMALL, q_lora_rank=None)], ids=["", "no q_lora"])
def test_transformer_engine_spells_every_name_as_the_torch_modules(
    as_rank, monkeypatch, arch, meta
):
    """Same names, order, shapes and sharding marks, so that one checkpoint fits both."""
    pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine does not import")
    # Its modules refuse to be built where there is no GPU; these need none.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = META if meta else {}
    layout = Parallel(tp_size=2, ep_size=2)
    engine, torch_modules = (
        as_rank(arch, layout, 0, 4, transformer_engine=with_engine, meta=meta, options=options)
        for with_engine in (True, False)
    )
    # On the meta device Transformer Engine marks its parameters later, when it fills them.
    marks = {} if meta else MARKS
    assert _describe(engine, marks) == _describe(torch_modules, marks)


def _describe(bridge: Bridge, marks: dict) -> list[tuple]:
    return [
        (name, tuple(p.shape), [getattr(p, mark, default) for mark, default in marks.items()])
        for chunk in bridge.chunks
        for name, p in chunk.named_parameters()
    ]


def test_an_error_of_one_rank_is_raised_with_its_rank(as_rank):
    as_rank(SMALL, Parallel(), 0, 1)
    raise_together("")
    with pytest.raises(SharedError, match="shard 3 is truncated"):
        raise_together("shard 3 is truncated")
