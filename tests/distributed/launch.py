"""Starts `worker.py` under torchrun and reads what it wrote."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
from distributed.worker import Case, Outcome
from safetensors.torch import load_file
from torch import Tensor

WORKER = Path(__file__).with_name("worker.py")


class Results:
    """What the cases of all launches into one directory gave."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def outcome(self, name: str) -> Outcome:
        return Outcome(**json.loads((self.out / f"{name}.json").read_text()))

    def tensors(self, name: str, what: str) -> dict[str, Tensor]:
        return load_file(self.out / name / f"{what}.safetensors")


def launch_selected(
    request: pytest.FixtureRequest,
    launches: Sequence[Mapping[int, Sequence[Case]]],
    *,
    references: Sequence[Case],
    hf_dir: Path,
    out: Path,
) -> Results:
    """One launch for each number of processes: `references` in one, and the cases of `launches`.

    Only cases of selected tests (`-k`), so that one layout can be looked at by itself.
    """
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    selected = [each.params.get("case") for each in parameters if each is not None]
    for size in sorted({1}.union(*launches)):
        cases = [one for part in launches for one in part.get(size, []) if one in selected]
        if size == 1:
            cases = [*references, *cases]
        if cases:
            launch(size, cases, hf_dir=hf_dir, out=out)
    return Results(out)


def launch(
    num_processes: int,
    cases: Sequence[Case],
    *,
    hf_dir: Path,
    out: Path,
    batch_size: int = 8,
    longest: int = 24,
    device: str = "cpu",
    timeout_s: float = 1800,
) -> Results:
    """Runs all cases in one launch; a failure shows the end of the ranks' output."""
    out.mkdir(parents=True, exist_ok=True)
    plan = out / f"plan{num_processes}.json"
    content = {
        "hf_dir": str(hf_dir),
        "out": str(out),
        "cases": [asdict(case) for case in cases],
        "batch_size": batch_size,
        "longest": longest,
        "device": device,
    }
    plan.write_text(json.dumps(content))
    torchrun(num_processes, WORKER, plan, timeout_s=timeout_s)
    return Results(out)


def torchrun(num_processes: int, script: Path, *arguments: Path, timeout_s: float = 1800) -> None:
    """Runs a script of this folder; a failure shows the end of the ranks' output."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={num_processes}", str(script), *map(str, arguments)]
    tests = str(WORKER.parents[1])
    environment = os.environ | {"PYTHONPATH": f"{tests}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
