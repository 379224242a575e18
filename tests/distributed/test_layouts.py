"""The same checkpoint and data in every layout give the same numbers as in one process."""

import pytest
import torch
from distributed.launch import Results, launch, launch_selected
from distributed.layouts import (
    ALLGATHER,
    EXCHANGE,
    FULL,
    ONE,
    OVERLAP,
    SELECTIVE,
    case,
    check,
    is_bias,
    worst,
)
from distributed.worker import Case
from hf_reference import build, read
from torch import Tensor

LOSSES = {"balance": 1e-2, "experts": {"z_loss_coefficient": 1e-2}}
BALANCED = Case("one process, balance and z loss", **LOSSES)
MOVES = {"experts": {"bias": "update", "bias_update_rate": 0.05}}
MOVING = Case("one process, biases move", **MOVES)
# Gradients are read after the step, and only those in fp32 are clipped where they are.
BF16 = Case("one process, bf16", dtype="bf16", optimizer={"clip_grad": 0.0})
BF16_GRADIENTS = {"dtype": "bf16", "optimizer": {"gradients": "bf16", "clip_grad": 0.0}}
BF16_GRADIENT_TOLERANCE = 2e-2
ALL_MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")

LAYOUTS: dict[int, list[Case]] = {
    1: [
        case("all samples in one row", micro_batch_size=8),
        case("two samples a row, four micro-batches", micro_batch_size=2),
        case("full recompute", memory=FULL),
        case("selective recompute", memory=SELECTIVE),
        case("every module computed again", memory=SELECTIVE | {"recompute_modules": ALL_MODULES}),
        case("several lengths a row", packed=True),
    ],
    2: [
        case("DP2"),
        case("DP2 overlapped", optimizer=OVERLAP),
        case("DP2 two optimizer instances", parallel={"num_optimizer_instances": 2}),
        case("DP2 two samples a row", micro_batch_size=2),
        case("TP2"),
        case("TP2 selective recompute", memory=SELECTIVE),
        case("EP2"),
        case("EP2 allgather", experts=ALLGATHER),
        case("EP2 all-to-alls overlapped", experts=EXCHANGE),
        case("EP2 one micro-batch, overlapped", experts=EXCHANGE, micro_batch_size=4),
        case(
            "EP2 every module but moe computed again, overlapped",
            experts=EXCHANGE,
            memory=SELECTIVE | {"recompute_modules": tuple(m for m in ALL_MODULES if m != "moe")},
        ),
        case("ETP2 allgather", experts=ALLGATHER),
        case("PP2"),
        case("PP2 VPP2"),
        case("CP2"),
        case("CP2 several lengths a row", packed=True),
        case("PP2 several lengths a row", packed=True),
    ],
    4: [
        case("TP4"),
        case("EP4"),
        case("PP4"),
        case("CP4"),
        case("DP4 two optimizer instances", parallel={"num_optimizer_instances": 2}),
        case("TP2 EP4"),
        case("TP2 ETP2 EP2 allgather packed", micro_batch_size=2, experts=ALLGATHER),
        case("TP2 PP2 EP2 packed", micro_batch_size=4),
        case("CP2 PP2 packed", micro_batch_size=2),
        case("TP2 CP2 EP4"),
        case("CP2 PP2 VPP2 full recompute", memory=FULL),
        case("PP2 VPP2 EP2 overlapped", experts=EXCHANGE, optimizer=OVERLAP),
        case("PP4 MTP apart from the loss", parallel={"stages": "Et*4|t*4|m|L"}),
        case("PP4 uneven, one empty", parallel={"stages": "Et*5|t*3|-|mL"}),
    ],
    8: [
        case("EP8"),
        case("PP4 VPP2 uneven", parallel={"stages": "E|t*2|t|t|t|t|t|tmL"}),
        case("TP2 PP2 CP2 EP4 packed", micro_batch_size=2),
        case("TP2 PP2 CP2 EP4 several lengths a row", packed=True),
        case("TP2 CP2 EP4 several lengths a row, overlapped", packed=True, experts=EXCHANGE),
    ],
}
WITH_LOSSES: dict[int, list[Case]] = {
    2: [
        case("TP2, balance and z loss", **LOSSES),
        case("EP2, balance and z loss", **LOSSES),
        case("CP2, balance and z loss", **LOSSES),
        case("PP2 full recompute, balance and z loss", memory=FULL, **LOSSES),
        case("CP2 several lengths a row, balance and z loss", packed=True, **LOSSES),
    ],
    4: [
        case("TP2 CP2 EP4 packed, balance and z loss", micro_batch_size=4, **LOSSES),
        case(
            "TP2 EP2 selective recompute, overlapped, balance and z loss",
            memory=SELECTIVE,
            balance=LOSSES["balance"],
            experts=LOSSES["experts"] | EXCHANGE,
        ),
    ],
}
WITH_MOVING_BIASES: dict[int, list[Case]] = {
    4: [
        case("TP2 CP2 EP4, biases move", **MOVES),
        case("PP2 DP2 packed, biases move", micro_batch_size=2, **MOVES),
    ],
}
WITH_BF16_GRADIENTS: dict[int, list[Case]] = {
    1: [case("bf16 gradients", **BF16_GRADIENTS)],
    2: [case("DP2 bf16 gradients", **BF16_GRADIENTS)],
}
# Each in a layout where it shows.
WRONG: dict[int, list[Case]] = {
    2: [
        case("TP2 wrong", mistake="an unreduced gradient under TP"),
        case("DP2 packed wrong", micro_batch_size=4, mistake="labels shifted across documents"),
        case("CP2 packed wrong", packed=True, mistake="documents that see their neighbours"),
        case("DP2 wrong", mistake="the loss averaged per rank"),
        case("PP2 wrong", mistake="a layer placed twice"),
        case("EP2 wrong", mistake="a bf16 bias"),
        case(
            "EP2 overlapped wrong",
            experts=EXCHANGE,
            mistake="a schedule plan that forgets documents",
        ),
    ]
}
REFERENCES = (ONE, BALANCED, MOVING, BF16)
LAUNCHES = (LAYOUTS, WITH_LOSSES, WITH_MOVING_BIASES, WITH_BF16_GRADIENTS, WRONG)


def _all(cases: dict[int, list[Case]]) -> list[Case]:
    return [case for of_size in cases.values() for case in of_size]


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    return build(num_hidden_layers=8).save(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def results(request, hf_dir, tmp_path_factory) -> Results:
    out = tmp_path_factory.mktemp("out")
    return launch_selected(request, LAUNCHES, references=REFERENCES, hf_dir=hf_dir, out=out)


@pytest.mark.slow
@pytest.mark.parametrize("case", _all(LAYOUTS), ids=str)
def test_a_layout_gives_the_numbers_of_one_process(results, hf_dir, case):
    check(results, case, ONE, read(hf_dir))


@pytest.mark.slow
@pytest.mark.parametrize("case", _all(WITH_LOSSES), ids=str)
def test_the_routers_losses_do_not_depend_on_the_layout(results, hf_dir, case):
    check(results, case, BALANCED, read(hf_dir))


@pytest.mark.slow
def test_the_routers_losses_reach_the_routers(results):
    plain, balanced = (results.tensors(c.name, "gradients") for c in (ONE, BALANCED))
    routers = [name for name in plain if name.endswith("mlp.gate.weight")]
    assert routers
    assert all(not torch.equal(plain[name], balanced[name]) for name in routers)


@pytest.mark.slow
@pytest.mark.parametrize("case", _all(WITH_MOVING_BIASES), ids=str)
def test_the_experts_biases_move_alike_in_every_layout(results, hf_dir, case):
    before = read(hf_dir)
    check(results, case, MOVING, before)
    after = results.tensors(case.name, "weights")
    assert all(not torch.equal(after[name], before[name]) for name in filter(is_bias, before))


@pytest.mark.slow
@pytest.mark.parametrize("case", _all(WITH_BF16_GRADIENTS), ids=str)
def test_gradients_summed_in_bf16_are_near_those_in_fp32(results, case):
    """Each of eight sums rounds to 2^-9 of itself; measured 6e-3 of a gradient's norm."""
    ours, theirs = (results.tensors(c.name, "gradients") for c in (case, BF16))
    error, name = worst(ours, theirs)
    assert 0 < error < BF16_GRADIENT_TOLERANCE, f"gradient of {name}: {error:.1e}"
    losses, expected = (results.outcome(c.name).losses for c in (case, BF16))
    assert losses == pytest.approx(expected, rel=BF16_GRADIENT_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("case", _all(WRONG), ids=lambda case: case.mistake)
def test_a_planted_mistake_is_found(results, hf_dir, case):
    with pytest.raises(AssertionError):
        check(results, case, ONE, read(hf_dir))


ROUND_TRIPS = {
    1: [Case("bf16 TP1", dtype="bf16", steps=0)],
    2: [
        Case("bf16 TP2", {"tp_size": 2}, dtype="bf16", steps=0),
        Case("bf16 EP2", {"ep_size": 2}, dtype="bf16", steps=0),
        Case("bf16 PP2", {"pp_size": 2}, dtype="bf16", steps=0),
        Case("bf16 PP2 VPP2", {"pp_size": 2, "vpp_size": 2}, dtype="bf16", steps=0),
        Case("bf16 ETP2", {"etp_size": 2}, dtype="bf16", steps=0),
        Case("bf16 TP2 EP2", {"tp_size": 2, "ep_size": 2}, dtype="bf16", steps=0),
    ],
}


@pytest.mark.slow
def test_load_and_export_give_back_every_bit(tmp_path):
    hf_dir = build(num_hidden_layers=4, num_mtp_layers=2).save(
        tmp_path / "hf", dtype=torch.bfloat16
    )
    original = read(hf_dir)
    assert original["model.layers.4.mlp.gate.e_score_correction_bias"].dtype is torch.float32
    for num_processes, cases in ROUND_TRIPS.items():
        results = launch(num_processes, cases, hf_dir=hf_dir, out=tmp_path / "out")
        for one in cases:
            back = results.tensors(one.name, "weights")
            assert back.keys() == original.keys(), one.name
            wrong = [n for n, t in original.items() if not _same_bits(t, back[n])]
            assert not wrong, f"{one.name}: {wrong}"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
