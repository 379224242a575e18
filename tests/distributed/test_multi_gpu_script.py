"""benchmarks/multi_gpu.py over CPU processes: its layouts train, and its file is whole."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["EP2 bf16, shared expert overlapped", "TP2 EP2 bf16", "CP2 EP2 bf16 32k"]


def test_tiny_layers_in_each_layout_train_and_are_written_down(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(ROOT / "benchmarks" / "multi_gpu.py"), "--smoke"]
    command += ["--steps", "1", "--json", str(tmp_path / "rows.json"), "--only", *NAMES]
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": search}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [row["measured"] for row in json.loads((tmp_path / "rows.json").read_text())]
    assert [row["name"] for row in rows] == NAMES
    for row in rows:
        assert row["loss"] == pytest.approx(math.log(256), rel=0.1)
        assert row["tokens_per_second"] > 0
        assert row["name"] in done.stdout
