"""Two processes under torchrun, one of which hangs, or is the only one to get a signal."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_job import write_chats, write_job, write_model

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("hang_worker.py")


def _launch(what: str, directory: Path, **train: float) -> tuple[int, str, float]:
    """Exit code, output, seconds."""
    model = write_model(directory / "model")
    job = write_job(
        directory,
        model,
        write_chats(directory / "chats.jsonl"),
        train={"global_batch_size": 2, "device": "cpu", "num_epochs": 2, **train},
    )
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(WORKER), what, str(job)]
    tests = str(WORKER.parents[1])
    environment = os.environ | {"PYTHONPATH": f"{tests}:{os.environ.get('PYTHONPATH', '')}"}
    began = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


def test_a_hang_ends_the_job_with_the_stack_of_every_rank(tmp_path):
    code, said, seconds = _launch("hang", tmp_path, hang_timeout_s=15.0)
    assert code != 0
    assert seconds < 200, said[-3000:]
    stacks = [(tmp_path / "log" / "stacks" / f"rank_0000{r}.txt").read_text() for r in (0, 1)]
    assert "in falls_asleep" in stacks[1]
    assert "in all_reduce" in stacks[0]
    assert "in falls_asleep" not in stacks[0]


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path):
    """It comes after step 2, so it is known to all with the losses of the next."""
    code, said, _ = _launch("signal", tmp_path)
    assert code != 0
    folder = tmp_path / "out-checkpoints"
    assert (folder / "requeue").read_text() == "3\n", said[-3000:]
    assert [path.name for path in folder.glob("iter_*")] == ["iter_0000003"]
    assert "a signal to another rank: stopped after step 3" in said
    assert "exitcode  : 75" in said
    assert not (tmp_path / "out").exists()
