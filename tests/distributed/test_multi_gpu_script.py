"""The scripts for several GPUs over CPU processes: what they do is done, and what they write whole.

benchmarks/multi_gpu.py, multi_gpu_files.py and soak.py.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    "EP2 bf16, shared expert overlapped",
    "EP2 bf16, all-to-alls overlapped",
    "TP2 EP2 bf16",
    "CP2 EP2 bf16 32k",
]


def _run(command: list[str]) -> str:
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": search}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _on_two(script: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(ROOT / "benchmarks" / script), "--smoke"]
    return _run([*command, *arguments])


def test_tiny_layers_in_each_layout_train_and_are_written_down(tmp_path):
    file = tmp_path / "rows.json"
    said = _on_two("multi_gpu.py", "--steps", "1", "--json", str(file), "--only", *NAMES)
    written = json.loads(file.read_text())
    assert all(row["projected_ms"] > 0 and row["projected_peak_gib"] > 0 for row in written)
    rows = [row["measured"] for row in written]
    assert [row["name"] for row in rows] == NAMES
    for row in rows:
        assert row["loss"] == pytest.approx(math.log(256), rel=0.1)
        assert row["tokens_per_second"] > 0
        assert row["name"] in said


def test_files_are_exported_loaded_and_saved_by_two_ranks(tmp_path):
    file = tmp_path / "medians.json"
    said = _on_two(
        "multi_gpu_files.py", "--repeats", "1", "--json", str(file), "--dir", str(tmp_path)
    )
    medians = json.loads(file.read_text())
    # 288,800 parameters in bf16, and names; masters and moments in fp32 are seven times as much.
    assert 1 < medians["model GB"] / (2 * 288_800 / 1e9) < 1.15
    assert 7 < medians["checkpoint GB"] / medians["model GB"] < 10
    assert 0 < medians["asynchronous still s"] <= medians["asynchronous whole s"]
    assert all(f"{name} " in said for name in ("export", "load", "asynchronous", "synchronous"))
    assert [path.name for path in tmp_path.iterdir()] == ["medians.json"]


def test_a_training_that_loses_a_rank_goes_on_with_the_same_losses(tmp_path):
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "soak.py")]
    command += ["--processes", "2", "--device", "cpu", "--minutes", "0.1", "--every", "2"]
    said = _run([*command, "--dir", str(tmp_path / "soak")])
    found = re.search(r"killed after step (\d+).* from step (\d+).* after step (\d+) with a", said)
    assert found is not None, said
    killed, resumed, last = map(int, found.groups())
    assert resumed < killed <= last
