"""What the tests of training over nodes share: a small job of 12 steps, and equal weights."""

import os
import subprocess
import sys
from pathlib import Path

from environment import ROOT
from safetensors.torch import load_file

# In a process of its own: `small_job` is not on the path of these tests.
_WRITE = """
import sys
from pathlib import Path
from small_job import write_chats, write_job, write_model

place = Path(sys.argv[1])
model = write_model(place / "model", hidden_size=16, kv_lora_rank=8, q_lora_rank=8)
write_job(
    place, model, write_chats(place / "chats.jsonl"),
    train={"global_batch_size": 4, "num_epochs": 8, "device": "cpu"},
    checkpoint={"every_steps": 2},
    parallel={"ep_size": 2},
    experts={"bias": "update"},
)
"""


def write_inputs(place: Path) -> Path:
    """Model, chats and job.yaml in `place`."""
    paths = [str(ROOT), str(ROOT / "tests")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "ignore", "-c", _WRITE, str(place)]
    subprocess.run(command, check=True, env=environment, timeout=120)
    return place


def options(inputs: Path, runs: Path, name: str) -> list[str]:
    """Of either script: this job, on CPUs."""
    own = ["--gpus-per-node=0", "--job", str(inputs / "job.yaml"), "--name", name]
    return [*own, "--runs", str(runs), "--python", sys.executable]


def assert_same(one: Path, other: Path) -> None:
    """Of two models, bit for bit."""
    ours, theirs = (load_file(place / "model.safetensors") for place in (one, other))
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not ours[key].equal(theirs[key])] == []
