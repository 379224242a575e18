"""Leads many layouts through the parity gate in one torchrun launch.

    torchrun --nproc-per-node N gate_worker.py PLAN.json

PLAN.json: {"hf_dir": {"fp32", "bf16"}, "out", "cases": [Case...]}. Rank 0 writes `out/NAME.json`:
the error, or null, and each part's share of what is allowed.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gate_model
import torch
import torch.distributed as dist
from distributed.worker import DTYPES

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.placement import mtp_stage, place
from megatron_dsv3.convert.bridge import Bridge
from megatron_dsv3.model import cpu
from megatron_dsv3.model.groups import Groups, SharedError, leave_layout, start, stop


@dataclass(frozen=True)
class Case:
    """One layout; `mistake` is one of `MISTAKES`, on the last rank alone."""

    name: str
    parallel: dict[str, Any] = field(default_factory=dict)
    dtype: str = "fp32"
    dispatcher: str = "alltoall"
    mistake: str | None = None


def _scale(name: str) -> Any:
    """Doubles a parameter of this rank, by the end of its name."""

    def damage(bridge: Bridge) -> None:
        if bridge.groups.rank == bridge.groups.world_size - 1:
            tensors = [t for param, t in bridge.local_tensors() if param.mcore.endswith(name)]
            assert tensors
            for tensor in tensors:
                tensor.data.mul_(2)

    return damage


MISTAKES = {
    "layer 5": _scale("decoder.layers.5.self_attention.linear_proj.weight"),
    "an expert": _scale("decoder.layers.2.mlp.experts.linear_fc2.weight15"),
    "MTP": _scale("mtp.layers.0.eh_proj.weight"),
    "head": _scale("output_layer.weight"),
}


def run(case: Case, hf_dir: Path, groups: Groups, parallel: Parallel) -> dict[str, Any]:
    damage = MISTAKES[case.mistake] if case.mistake else lambda bridge: None
    try:
        report = gate_model.check(
            hf_dir,
            groups,
            parallel,
            dtype=DTYPES[case.dtype],
            dispatcher=case.dispatcher,
            damage=damage,
            longest=24,
        )
    except SharedError as error:
        return {"error": str(error), "shares": {}}
    return {"error": None, "shares": {d.part: d.share for d in report.differences}}


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    cpu.enable()
    for entry in plan["cases"]:
        case, hf_dir = Case(**entry), Path(plan["hf_dir"][entry["dtype"]])
        parallel = Parallel(**case.parallel)
        stage = mtp_stage(place(Architecture.from_hf(hf_dir), parallel))
        groups = start(parallel, torch.device("cpu"), mtp_stage=stage)
        try:
            outcome = run(case, hf_dir, groups, parallel)
        except Exception as error:
            error.add_note(f"in case {case.name!r}")
            raise
        outcomes: list[Any] = [None] * groups.world_size
        dist.all_gather_object(outcomes, outcome)
        assert all(str(other) == str(outcome) for other in outcomes), "every rank says the same"
        if groups.rank == 0:
            (Path(plan["out"]) / f"{case.name}.json").write_text(json.dumps(outcome))
        leave_layout()
    stop()


if __name__ == "__main__":
    main()
