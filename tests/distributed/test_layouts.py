"""The same checkpoint and data in every layout give the same numbers as in one process.

Compared per parameter: a wrong reduction of one norm leaves the loss as it was and moves the
gradient norm by less than 1e-4.
"""

import pytest
import torch
from distributed.launch import Results, launch
from distributed.worker import Case
from hf_reference import build, read
from torch import Tensor

LOSS_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4
UPDATE_TOLERANCE = 1e-3

ONE = Case("one process")
ONE_BALANCED = Case("one process, balance loss", balance=1e-2)
TWO_PROCESSES = [
    Case("DP2"),
    Case("DP2 overlapped", overlap=True),
    Case("DP2 two samples a micro-batch", micro_batch_size=2),
    Case("TP2", {"tp_size": 2}),
    Case("EP2", {"ep_size": 2}),
    Case("PP2", {"pp_size": 2}),
    Case("CP2", {"cp_size": 2}),
]
TWO_BALANCED = [
    Case("TP2, balance loss", {"tp_size": 2}, balance=1e-2),
    Case("EP2, balance loss", {"ep_size": 2}, balance=1e-2),
    Case("CP2, balance loss", {"cp_size": 2}, balance=1e-2),
]
FOUR_PROCESSES = [
    Case("TP2 EP2 DP2", {"tp_size": 2, "ep_size": 2}),
    Case("TP2 PP2 EP2", {"tp_size": 2, "pp_size": 2, "ep_size": 2}),
    Case("EP4", {"ep_size": 4}),
]
AGAINST_ONE = [*TWO_PROCESSES, *FOUR_PROCESSES]


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    return build(num_hidden_layers=4).save(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def results(hf_dir, tmp_path_factory) -> Results:
    out = tmp_path_factory.mktemp("out")
    launch(1, [ONE, ONE_BALANCED], hf_dir=hf_dir, out=out)
    launch(2, [*TWO_PROCESSES, *TWO_BALANCED], hf_dir=hf_dir, out=out)
    return launch(4, FOUR_PROCESSES, hf_dir=hf_dir, out=out)


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
@pytest.mark.parametrize("case", AGAINST_ONE, ids=[case.name for case in AGAINST_ONE])
def test_a_layout_gives_the_numbers_of_one_process(results, hf_dir, case):
    _check(results, case, ONE, read(hf_dir))


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("case", TWO_BALANCED, ids=[case.name for case in TWO_BALANCED])
def test_the_balance_loss_does_not_depend_on_the_layout(results, hf_dir, case):
    _check(results, case, ONE_BALANCED, read(hf_dir))


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
def test_the_balance_loss_reaches_the_routers(results):
    plain, balanced = (results.tensors(c.name, "gradients") for c in (ONE, ONE_BALANCED))
    routers = [name for name in plain if name.endswith("mlp.gate.weight")]
    assert routers
    assert all(not torch.equal(plain[name], balanced[name]) for name in routers)


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
