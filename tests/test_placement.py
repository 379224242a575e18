"""Stage placement: against Megatron-Core's own reading, and against trying every placement."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_dsv3.config.architecture import DEEPSEEK_V3
from megatron_dsv3.config.counts import flops_per_token
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.placement import Stage, mcore_layout, place, stage_costs


def text(stages: tuple[Stage, ...]) -> str:
    return "|".join(stage.letters for stage in stages)


def test_61_layers_on_8_stages_leave_the_last_the_lighter_by_what_the_heads_cost():
    stages = place(DEEPSEEK_V3, Parallel(pp_size=8))
    assert text(stages) == "E" + "|".join(["t" * 8] * 7 + ["tttttmL"])
    assert stages[-1] == Stage(
        pp_rank=7,
        vpp_rank=0,
        has_embedding=False,
        layers=tuple(range(56, 61)),
        mtp_layers=(0,),
        has_final_norm=True,
        has_loss=True,
    )


def test_chunks_go_round_the_pipeline():
    stages = place(replace(DEEPSEEK_V3, num_layers=6), Parallel(pp_size=2, vpp_size=2))
    assert [(s.vpp_rank, s.pp_rank) for s in stages] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [layer for s in stages for layer in s.layers] == list(range(6))


def test_one_process_holds_everything():
    [stage] = place(DEEPSEEK_V3, Parallel())
    assert stage.letters == "E" + "t" * 61 + "mL"


@settings(deadline=None)
@given(
    layers=st.integers(3, 130),
    pp_size=st.integers(1, 32),
    vpp_size=st.integers(1, 6),
    mtp=st.integers(0, 2),
)
def test_any_model_is_placed_whole_or_refused(layers, pp_size, vpp_size, mtp):
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
    assert stages[-1].mtp_layers == tuple(range(mtp))
    assert text(stages).startswith("E")
    assert text(stages).endswith("L")
    assert "-" not in text(stages)


@pytest.mark.parametrize("num_chunks", [2, 3, 4, 5])
@pytest.mark.parametrize("num_layers", [5, 9])
def test_no_other_placement_has_a_cheaper_costliest_chunk(num_layers, num_chunks):
    arch = replace(DEEPSEEK_V3, num_layers=num_layers)
    parallel = Parallel(pp_size=num_chunks)
    ours = max(stage_costs(arch, place(arch, parallel), 4096))
    others = []
    for cuts in itertools.combinations(range(1, num_layers + 1), num_chunks - 1):
        counts = [b - a for a, b in itertools.pairwise((0, *cuts, num_layers))]
        letters = "E" + "|".join("t" * count for count in counts) + "mL"
        stages = place(arch, Parallel(pp_size=num_chunks, stages=letters))
        others.append(max(stage_costs(arch, stages, 4096)))
    assert ours == pytest.approx(min(others))


def test_costs_are_shares_of_the_models_flops():
    stages = place(DEEPSEEK_V3, Parallel(pp_size=4))
    assert sum(stage_costs(DEEPSEEK_V3, stages, 32768)) == pytest.approx(1)
    without_mtp = replace(DEEPSEEK_V3, num_mtp_layers=0)
    [first, last] = place(without_mtp, Parallel(pp_size=2, stages="Et*61|L"))
    head = stage_costs(without_mtp, [first, last], 4096)[1]
    assert head == pytest.approx(6 * 7168 * 129280 / flops_per_token(without_mtp, 4096))


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
        if stage.layers:
            assert layout.get_layer_offset(LayerType.decoder, **where) == stage.layers[0]
        assert layout.get_layer_id_list(LayerType.mtp, **where) == list(stage.mtp_layers)
        kinds = layout.layout[stage.pp_rank][stage.vpp_rank]
        assert (LayerType.embedding in kinds) == stage.has_embedding
        assert (LayerType.loss in kinds) == stage.has_loss


STRINGS = [
    (8, 1, "Et*7|t*8|t*8|t*8|t*8|t*8|t*7|t*7mL"),
    (16, 1, "Et*3|(t*4|)*14t*2mL"),
    (4, 4, "E t*4 | (t*4|)*14 t, m, L"),
    (8, 2, "Et*3|(tttt|)*14t*2mL"),
]


@pytest.mark.parametrize(("pp_size", "vpp_size", "string"), STRINGS)
def test_a_string_means_what_it_means_to_megatron_core(pp_size, vpp_size, string):
    stages = place(DEEPSEEK_V3, Parallel(pp_size=pp_size, vpp_size=vpp_size, stages=string))
    theirs = PipelineParallelLayerLayout.parse_str_to_list(string.replace(" ", ""))
    assert mcore_layout(stages) == [[kind.name for kind in chunk] for chunk in theirs]


def test_mtp_may_stand_apart_from_the_loss_and_a_chunk_may_be_empty_on_purpose():
    arch = replace(DEEPSEEK_V3, num_layers=4)
    stages = place(arch, Parallel(pp_size=4, stages="Et*4|-|m|L"))
    assert text(stages) == "Etttt|-|m|L"
    assert stages[2].mtp_layers == (0,)
    assert not stages[2].has_loss


WRONG = {
    "a layer twice": ("Et*31|t*31mL", "expected 61 x t, got 62"),
    "a layer missing": ("Et*30|t*30mL", "expected 61 x t, got 60"),
    "no MTP": ("Et*31|t*30L", "expected 1 x m, got 0"),
    "MTP before a layer": ("Et*31m|t*30L", "expected the order E, all t, all m, L"),
    "no loss": ("Et*31|t*30m", "expected 1 x L, got 0"),
    "three chunks for two": (
        "Et*31|t*29|tmL",
        r"expected pp_size\(2\) \* vpp_size\(1\) = 2 chunks, got 3",
    ),
    "an empty chunk": ("|Et*61mL", "chunk 1 is empty; write - for one that is meant to be"),
    "an empty first chunk": ("-|Et*61mL", "E must be in the first chunk and L in the last"),
    "an empty last chunk": ("Et*61mL|-", "E must be in the first chunk and L in the last"),
    "an unknown letter": ("Et*31|x*30mL", "'x' at character 7 means nothing"),
}


@pytest.mark.parametrize(("string", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_string_that_does_not_place_the_model_is_refused(string, message):
    with pytest.raises(ValueError, match=message):
        place(DEEPSEEK_V3, Parallel(pp_size=2, stages=string))


def test_mtp_layers_on_two_chunks_are_refused():
    arch = replace(DEEPSEEK_V3, num_mtp_layers=2)
    with pytest.raises(ValueError, match="all MTP layers must be in one chunk"):
        place(arch, Parallel(pp_size=2, stages="Et*61m|mL"))
