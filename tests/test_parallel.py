"""Sizes of parallelism: what divides, what is said where not, and which layer lives where."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import parallel_state
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from pydantic import ValidationError

from megatron_dsv3.config.architecture import DEEPSEEK_V3
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.placement import Stage, mcore_layout, place


@pytest.mark.parametrize(
    ("parallel", "world_size", "dp_size", "edp_size"),
    [
        (Parallel(), 1, 1, 1),
        (Parallel(), 8, 8, 8),
        (Parallel(tp_size=2, cp_size=2), 8, 2, 8),
        (Parallel(ep_size=8), 8, 8, 1),
        (Parallel(tp_size=8, pp_size=8, ep_size=32), 1024, 16, 4),
        (Parallel(tp_size=2, pp_size=2, ep_size=2, etp_size=2, cp_size=2), 16, 2, 2),
    ],
)
def test_what_the_sizes_leave_of_the_world_are_copies(parallel, world_size, dp_size, edp_size):
    assert parallel.dp_size(world_size) == dp_size
    assert parallel.edp_size(world_size) == edp_size
    assert parallel.problems(DEEPSEEK_V3, world_size) == []


def test_a_world_that_does_not_divide_is_refused_with_all_factors():
    parallel = Parallel(tp_size=2, cp_size=2)
    message = (
        r"^world size 6 is not tp_size\(2\) \* pp_size\(1\) \* cp_size\(2\) \* dp; "
        r"start a multiple of 4 processes or change a size$"
    )
    with pytest.raises(ValueError, match=message):
        parallel.dp_size(6)
    experts = Parallel(ep_size=4, etp_size=2, pp_size=2)
    with pytest.raises(
        ValueError, match=r"size 24 is not etp_size\(2\) \* ep_size\(4\) \* pp_size\(2\) \* edp; "
    ):
        experts.edp_size(24)


def test_sequence_parallelism_comes_with_tensor_parallelism():
    assert not Parallel().sequence_parallel
    assert Parallel(tp_size=2).sequence_parallel


PROBLEMS = {
    "heads": ({"tp_size": 4}, {"num_heads": 6}, r"^num_attention_heads 6 .* tp_size\(4\); .* 3$"),
    "ffn": ({"tp_size": 4}, {"ffn_hidden_size": 6}, r"^intermediate_size 6 .* tp_size\(4\); .* 3$"),
    "shared expert": (
        {"tp_size": 4},
        {"moe_ffn_hidden_size": 6, "num_shared_experts": 3},
        r"moe_intermediate_size \* n_shared_experts 18 is not divisible by tp_size\(4\)",
    ),
    "vocabulary": (
        {"tp_size": 4},
        {"vocab_size": 129281},
        r"vocab_size 129281 .* tp_size\(4\); .* is 1, or pad .* to 129284 rows",
    ),
    "experts": ({"ep_size": 3}, {}, r"n_routed_experts 256 is not divisible by ep_size\(3\)"),
    "expert ffn": (
        {"etp_size": 4},
        {"moe_ffn_hidden_size": 6},
        r"^moe_intermediate_size 6 is not divisible by etp_size\(4\); .* fits is 3$",
    ),
    "stages": (
        {"pp_size": 8, "vpp_size": 8},
        {},
        r"pp_size\(8\) \* vpp_size\(8\) = 64 chunks, but the model has 61 layers",
    ),
    "chunks without stages": ({"vpp_size": 2}, {}, r"vpp_size\(2\) needs pp_size > 1"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_each_size_that_does_not_fit_the_model_is_named(case):
    sizes, changes, message = PROBLEMS[case]
    parallel, arch = Parallel(**sizes), replace(DEEPSEEK_V3, **changes)
    world_size = 3 * 2**10  # divisible by all of these sizes
    [problem] = parallel.problems(arch, world_size)
    assert re.search(message, problem)


def test_all_problems_are_reported_at_once():
    parallel = Parallel(tp_size=3, ep_size=5, pp_size=64)
    problems = parallel.problems(DEEPSEEK_V3, 8)
    starts = ["world size 8 is not tp", "world size 8 is not etp", "num_attention_heads 128"]
    starts += ["moe_intermediate_size * n_shared_experts 2048", "vocab_size 129280"]
    starts += ["n_routed_experts 256", "pp_size(64) * vpp_size(1)"]
    assert [p.startswith(s) for p, s in zip(problems, starts, strict=True)] == [True] * 7


def test_the_published_layouts_fit_v3():
    assert Parallel(tp_size=2, pp_size=8, ep_size=32).problems(DEEPSEEK_V3, 256) == []
    assert Parallel(pp_size=16, ep_size=64).problems(DEEPSEEK_V3, 2048) == []
    chunked = Parallel(tp_size=8, pp_size=8, vpp_size=4, ep_size=32)
    assert chunked.problems(DEEPSEEK_V3, 1024) == []


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, None])
def test_a_size_is_a_positive_integer(value):
    with pytest.raises(ValidationError, match="tp_size"):
        Parallel(tp_size=value)


def test_the_record_is_frozen_and_knows_its_fields():
    with pytest.raises(ValidationError, match="frozen"):
        Parallel().tp_size = 2
    with pytest.raises(ValidationError, match="Extra inputs"):
        Parallel(tensor_parallel=2)


def test_every_size_has_a_description():
    assert all(info.description for info in Parallel.model_fields.values())


def num_layers(stages):
    return [len(stage.layers) for stage in stages]


def test_61_layers_on_8_stages_leave_the_last_the_lighter():
    stages = place(DEEPSEEK_V3, Parallel(pp_size=8))
    assert num_layers(stages) == [7, 8, 8, 8, 8, 8, 7, 7]
    assert stages[0] == Stage(
        pp_rank=0,
        vpp_rank=0,
        has_embedding=True,
        layers=tuple(range(7)),
        mtp_layers=(),
        has_loss=False,
    )
    assert stages[-1] == Stage(
        pp_rank=7,
        vpp_rank=0,
        has_embedding=False,
        layers=tuple(range(54, 61)),
        mtp_layers=(0,),
        has_loss=True,
    )


def test_chunks_go_round_the_pipeline():
    stages = place(replace(DEEPSEEK_V3, num_layers=6), Parallel(pp_size=2, vpp_size=2))
    assert [(s.vpp_rank, s.pp_rank, s.layers) for s in stages] == [
        (0, 0, (0,)),
        (0, 1, (1, 2)),
        (1, 0, (3, 4)),
        (1, 1, (5,)),
    ]


def test_one_process_holds_everything():
    [stage] = place(DEEPSEEK_V3, Parallel())
    assert stage.has_embedding
    assert stage.has_loss
    assert stage.layers == tuple(range(61))
    assert stage.mtp_layers == (0,)


@given(
    layers=st.integers(3, 130),
    pp_size=st.integers(1, 32),
    vpp_size=st.integers(1, 6),
    mtp=st.integers(0, 2),
)
def test_any_model_is_placed_whole_and_evenly_or_refused(layers, pp_size, vpp_size, mtp):
    arch = replace(DEEPSEEK_V3, num_layers=layers, num_mtp_layers=mtp)
    parallel = Parallel(pp_size=pp_size, vpp_size=vpp_size)
    if problems := parallel.depth_problems(arch):
        with pytest.raises(
            ValueError, match=r"chunks, but the model has|needs pp_size > 1"
        ) as error:
            place(arch, parallel)
        assert str(error.value) == "; ".join(problems)
        return
    stages = place(arch, parallel)
    assert [s.vpp_rank * pp_size + s.pp_rank for s in stages] == list(range(pp_size * vpp_size))
    assert [layer for s in stages for layer in s.layers] == list(range(layers))
    assert [layer for s in stages for layer in s.mtp_layers] == list(range(mtp))
    counts = num_layers(stages)
    assert max(counts) - min(counts) <= 1
    assert min(counts) == counts[-1] >= 1
    assert [s.has_embedding for s in stages] == [True] + [False] * (len(stages) - 1)
    assert [s.has_loss for s in stages] == [False] * (len(stages) - 1) + [True]
    assert not any(s.mtp_layers for s in stages[:-1])


@pytest.mark.parametrize(("pp_size", "vpp_size"), [(1, 1), (2, 1), (8, 1), (16, 1), (4, 4), (3, 2)])
@pytest.mark.parametrize("mtp", [0, 1, 2])
def test_megatron_core_reads_back_the_same_layers(pp_size, vpp_size, mtp, monkeypatch):
    arch = replace(DEEPSEEK_V3, num_mtp_layers=mtp)
    stages = place(arch, Parallel(pp_size=pp_size, vpp_size=vpp_size))
    layout = PipelineParallelLayerLayout(mcore_layout(stages), pp_size)
    assert not layout.validate_layer_layout(arch.num_layers, mtp)  # True: MTP without the loss
    # Megatron-Core looks at vp_stage only where this global is set.
    monkeypatch.setattr(
        parallel_state,
        "_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE",
        vpp_size if vpp_size > 1 else None,
    )
    for stage in stages:
        where = {"pp_rank": stage.pp_rank, "vp_stage": stage.vpp_rank}
        assert layout.get_layer_id_list(LayerType.decoder, **where) == list(stage.layers)
        assert layout.get_layer_offset(LayerType.decoder, **where) == stage.layers[0]
        assert layout.get_layer_id_list(LayerType.mtp, **where) == list(stage.mtp_layers)
        kinds = layout.layout[stage.pp_rank][stage.vpp_rank]
        assert (LayerType.embedding in kinds) == stage.has_embedding
        assert (LayerType.loss in kinds) == stage.has_loss
