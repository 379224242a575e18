"""The parity gate in layouts: each agrees with transformers, one rank's mistake is named."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.gate_worker import Case
from distributed.launch import torchrun
from hf_reference import build

PP2_VPP2 = {"pp_size": 2, "vpp_size": 2}
ALL = {"tp_size": 2, "pp_size": 2, "ep_size": 2}
RIGHT: dict[int, list[Case]] = {
    2: [
        Case("TP2", {"tp_size": 2}),
        Case("EP2", {"ep_size": 2}),
        Case("ETP2", {"etp_size": 2}, dispatcher="allgather"),
        Case("PP2 VPP2", PP2_VPP2),
        Case("CP2", {"cp_size": 2}),
        Case("PP2 VPP2 in bf16", PP2_VPP2, dtype="bf16"),
        Case("TP2 in bf16", {"tp_size": 2}, dtype="bf16"),
    ],
    4: [
        Case("TP2 PP2 EP2", ALL),
        Case("CP2 PP2", {"cp_size": 2, "pp_size": 2}),
        Case("TP2 CP2 EP4", {"tp_size": 2, "cp_size": 2, "ep_size": 4}),
        Case("MTP apart from the loss", {"pp_size": 4, "stages": "E|t*8|m|L"}),
        Case("TP2 PP2 EP2 in bf16", ALL, dtype="bf16"),
    ],
}
WRONG: dict[int, list[tuple[Case, str]]] = {
    2: [
        (Case("TP2, layer 5", {"tp_size": 2}, mistake="layer 5"), "layer 5"),
        (Case("DP2, a replica's layer 5", mistake="layer 5"), "layer 5"),
        (Case("EP2, an expert", {"ep_size": 2}, mistake="an expert"), "layer 2"),
        (Case("CP2, layer 5", {"cp_size": 2}, mistake="layer 5"), "layer 5"),
        (Case("PP2 VPP2, MTP", PP2_VPP2, mistake="MTP"), "MTP layer 0"),
    ],
    4: [
        (Case("TP2 PP2 EP2, head", ALL, mistake="head"), "logits"),
        (Case("TP2 PP2 EP2, layer 5", ALL, mistake="layer 5"), "layer 5"),
    ],
}
PARTS = 8 + 6
"""Layers; embedding, logits and loss, and MTP's layer, logits and loss."""
ALL_RIGHT = [case for cases in RIGHT.values() for case in cases]
ALL_WRONG = [pair for pairs in WRONG.values() for pair in pairs]
LIMIT = {"fp32": 0.1, "bf16": 0.7}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("gate")
    model = build(num_hidden_layers=8)
    hf_dir = {
        "fp32": str(model.save(directory / "fp32")),
        "bf16": str(model.save(directory / "bf16", dtype=torch.bfloat16)),
    }
    for size, right in RIGHT.items():
        cases = [asdict(case) for case in [*right, *(case for case, _ in WRONG[size])]]
        plan = directory / f"plan{size}.json"
        plan.write_text(json.dumps({"hf_dir": hf_dir, "out": str(directory), "cases": cases}))
        torchrun(size, Path(__file__).with_name("gate_worker.py"), plan, timeout_s=600)
    return directory


def _read(outcomes: Path, case: Case) -> dict[str, Any]:
    outcome: dict[str, Any] = json.loads((outcomes / f"{case.name}.json").read_text())
    return outcome


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL_RIGHT, ids=[case.name for case in ALL_RIGHT])
def test_a_layout_computes_what_transformers_does(outcomes, case):
    outcome = _read(outcomes, case)
    assert outcome["error"] is None
    assert len(outcome["shares"]) == PARTS
    worst = max(outcome["shares"], key=outcome["shares"].__getitem__)
    assert outcome["shares"][worst] < LIMIT[case.dtype], worst


@pytest.mark.slow
@pytest.mark.parametrize(("case", "part"), ALL_WRONG, ids=[case.name for case, _ in ALL_WRONG])
def test_a_mistake_of_one_rank_is_named_on_all(outcomes, case, part):
    assert f"first in {part} (" in (_read(outcomes, case)["error"] or "")
