"""The same checkpoint and data in every layout give the same numbers as in one process.

Compared per parameter: a wrong reduction of one norm leaves the loss as it was and moves the
gradient norm by less than 1e-4.
"""

import re
from typing import Any

import pytest
import torch
from distributed.launch import Results, launch
from distributed.worker import Case
from hf_reference import build, read
from torch import Tensor

LOSS_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4
UPDATE_TOLERANCE = 1e-3

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
FULL, SELECTIVE = {"recompute": "full"}, {"recompute": "selective"}
ONE = Case("one process")
BALANCED = Case(
    "one process, balance and z loss", balance=1e-2, experts={"z_loss_coefficient": 1e-2}
)
LOSSES = {"balance": 1e-2, "experts": {"z_loss_coefficient": 1e-2}}
ALLGATHER = {"dispatcher": "allgather"}


def case(name: str, *, micro_batch_size: int = 1, **changes: Any) -> Case:
    """A layout by its name: `TP2 EP2`; sizes that are not named are 1, DP is what is left."""
    sizes = dict(re.findall(r"\b(TP|PP|VPP|EP|ETP|CP)(\d+)", name))
    parallel = {f"{key.lower()}_size": int(value) for key, value in sizes.items()}
    parallel |= changes.pop("parallel", {})
    return Case(name, parallel, micro_batch_size=micro_batch_size, **changes)


# A micro-batch of several samples is one row of packed documents.
LAYOUTS: dict[int, list[Case]] = {
    1: [
        case("all samples in one row", micro_batch_size=8),
        case("full recompute", memory=FULL),
        case("selective recompute", memory=SELECTIVE),
    ],
    2: [
        case("DP2"),
        case("DP2 overlapped", optimizer=OVERLAP),
        case("DP2 two samples a row", micro_batch_size=2),
        case("TP2"),
        case("TP2 selective recompute", memory=SELECTIVE),
        case("EP2"),
        case("EP2 allgather", experts=ALLGATHER),
        case("ETP2 allgather", experts=ALLGATHER),
        case("PP2"),
        case("PP2 VPP2"),
        case("CP2"),
    ],
    4: [
        case("TP4"),
        case("EP4"),
        case("PP4"),
        case("CP4"),
        case("DP4 two optimizer instances", parallel={"num_optimizer_instances": 2}),
        case("TP2 EP4"),
        case("TP2 PP2 EP2 packed", micro_batch_size=4),
        case("CP2 PP2 packed", micro_batch_size=2),
        case("TP2 CP2 EP4"),
        case("CP2 PP2 VPP2 full recompute", memory=FULL),
        case("PP4 MTP apart from the loss", parallel={"stages": "Et*4|t*4|m|L"}),
        case("PP4 uneven, one empty", parallel={"stages": "Et*5|t*3|-|mL"}),
    ],
    8: [
        case("EP8"),
        case("PP4 VPP2 uneven", parallel={"stages": "E|t*2|t|t|t|t|t|tmL"}),
        case("TP2 PP2 CP2 EP4 packed", micro_batch_size=2),
    ],
}
WITH_LOSSES: dict[int, list[Case]] = {
    2: [
        case("TP2, balance and z loss", **LOSSES),
        case("EP2, balance and z loss", **LOSSES),
        case("CP2, balance and z loss", **LOSSES),
        case("PP2 full recompute, balance and z loss", memory=FULL, **LOSSES),
    ],
    4: [case("TP2 CP2 EP4 packed, balance and z loss", micro_batch_size=4, **LOSSES)],
}
# Each in a layout where it shows.
WRONG: dict[int, list[Case]] = {
    2: [
        case("TP2 wrong", mistake="an unreduced gradient under TP"),
        case("DP2 packed wrong", micro_batch_size=4, mistake="labels shifted across documents"),
        case("DP2 wrong", mistake="the loss averaged per rank"),
        case("PP2 wrong", mistake="a layer placed twice"),
        case("EP2 wrong", mistake="a bf16 bias"),
    ]
}
ALL_WRONG = [case for cases in WRONG.values() for case in cases]
ALL = [case for cases in LAYOUTS.values() for case in cases]
ALL_WITH_LOSSES = [case for cases in WITH_LOSSES.values() for case in cases]


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    return build(num_hidden_layers=8).save(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def results(hf_dir, tmp_path_factory) -> Results:
    out = tmp_path_factory.mktemp("out")
    for size, cases in LAYOUTS.items():
        references = [ONE, BALANCED] if size == 1 else []
        launch(
            size,
            [*references, *cases, *WITH_LOSSES.get(size, []), *WRONG.get(size, [])],
            hf_dir=hf_dir,
            out=out,
        )
    return Results(out)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


def _worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    assert ours.keys() == theirs.keys()
    weights = [name for name in theirs if "e_score" not in name]
    return max((_relative(ours[name], theirs[name]), name) for name in weights)


def _check(results: Results, case: Case, reference: Case, before: dict[str, Tensor]) -> None:
    ours, theirs = results.outcome(case.name), results.outcome(reference.name)
    assert ours.losses == pytest.approx(theirs.losses, rel=LOSS_TOLERANCE)
    assert ours.mtp_losses == pytest.approx(theirs.mtp_losses, rel=LOSS_TOLERANCE)
    assert ours.grad_norms == pytest.approx(theirs.grad_norms, rel=LOSS_TOLERANCE)
    assert ours.balances == pytest.approx(theirs.balances, rel=1e-6)
    gradients = [results.tensors(c.name, "gradients") for c in (case, reference)]
    error, name = _worst(*gradients)
    assert error < GRADIENT_TOLERANCE, f"gradient of {name}: {error:.1e}"
    updates = [
        {k: v - before[k] for k, v in results.tensors(c.name, "weights").items()}
        for c in (case, reference)
    ]
    error, name = _worst(*updates)
    assert error < UPDATE_TOLERANCE, f"update of {name}: {error:.1e}"


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("case", ALL, ids=[case.name for case in ALL])
def test_a_layout_gives_the_numbers_of_one_process(results, hf_dir, case):
    _check(results, case, ONE, read(hf_dir))


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("case", ALL_WITH_LOSSES, ids=[case.name for case in ALL_WITH_LOSSES])
def test_the_routers_losses_do_not_depend_on_the_layout(results, hf_dir, case):
    _check(results, case, BALANCED, read(hf_dir))


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
def test_the_routers_losses_reach_the_routers(results):
    plain, balanced = (results.tensors(c.name, "gradients") for c in (ONE, BALANCED))
    routers = [name for name in plain if name.endswith("mlp.gate.weight")]
    assert routers
    assert all(not torch.equal(plain[name], balanced[name]) for name in routers)


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("case", ALL_WRONG, ids=[case.mistake for case in ALL_WRONG])
def test_a_planted_mistake_is_found(results, hf_dir, case):
    with pytest.raises(AssertionError):
        _check(results, case, ONE, read(hf_dir))


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
@pytest.mark.xdist_group("distributed")
def test_load_and_export_give_back_every_bit(tmp_path):
    hf_dir = build(num_hidden_layers=4, num_mtp_layers=2).save(
        tmp_path / "hf", dtype=torch.bfloat16
    )
    original = read(hf_dir)
    assert original["model.layers.4.mlp.gate.e_score_correction_bias"].dtype is torch.float32
    for num_processes, cases in ROUND_TRIPS.items():
        results = launch(num_processes, cases, hf_dir=hf_dir, out=tmp_path / "out")
        for case in cases:
            back = results.tensors(case.name, "weights")
            assert back.keys() == original.keys(), case.name
            wrong = [n for n, t in original.items() if not _same_bits(t, back[n])]
            assert not wrong, f"{case.name}: {wrong}"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
