"""A training that loses a rank to kill -9 in the middle, is started again and goes on.

    python benchmarks/soak.py --processes 8 [--minutes 5] [--dir build/soak] [--device cuda]

A random model learns the quickstart's data with a checkpoint every few steps. After half the time
one rank is killed; the job must end by itself, and the same command must go on from the last
checkpoint and give the same losses again for the steps that were lost. Exits with 1 where it does
not. Experts are spread over all processes.
"""

import argparse
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8_curve import MODEL, QUICKSTART, ROOT, path

from megatron_dsv3.checkpoint.directory import find_newest, step_of
from megatron_dsv3.commands.keeping import REQUEUE_FILE
from megatron_dsv3.train.metrics import StepRecord, read_metrics

SAME = {"cpu": 1e-6, "cuda": 1e-2}
"""How far a step's loss may be from what it was before the kill: a GPU sums in any order."""
PATIENCE_S = 300
"""For the first step, for a job to end, and for a last checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of it."""

    killed_after: int
    """Steps logged when the rank was killed."""
    resumed_from: int
    """Step of the checkpoint."""
    last_step: int
    seconds_to_end: float
    """From the kill until all processes were gone."""
    seconds_to_step: float
    """From the second start until its first step was logged."""
    apart: float
    """Largest relative difference of a loss that was computed twice."""


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--every", type=int, default=20, help="steps from checkpoint to checkpoint")
    parser.add_argument("--dir", type=Path, default=ROOT / "build" / "soak")
    parser.add_argument("--device", choices=sorted(SAME), default="cuda")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.dir, ignore_errors=True)
    arguments.dir.mkdir(parents=True)
    prepare(arguments.dir, small=arguments.device == "cpu")
    result = soak(command(arguments), arguments.dir, seconds=60 * arguments.minutes)
    print(
        f"killed after step {result.killed_after}, all gone {result.seconds_to_end:.1f} s later; "
        f"went on from step {result.resumed_from}, first step {result.seconds_to_step:.1f} s after "
        f"the start; stopped after step {result.last_step} with a checkpoint; losses of the "
        f"{result.killed_after - result.resumed_from} steps done twice at most {result.apart:.1e} "
        "apart"
    )
    if not result.apart <= SAME[arguments.device]:
        raise SystemExit(f"expected at most {SAME[arguments.device]}")


def prepare(directory: Path, *, small: bool) -> None:
    """Model and data."""
    functions = runpy.run_path(str(QUICKSTART / "prepare.py"))
    functions["write_model"](directory / "model", None if small else MODEL)
    functions["write_champ"](directory / "champ.jsonl")


def command(arguments: argparse.Namespace) -> list[str]:
    """The same for both starts."""
    directory: Path = arguments.dir
    on_gpu = arguments.device == "cuda"
    settings: dict[str, Any] = {
        "model.hf_dir": directory / "model",
        "data.store": "null",
        "data.template": "deepseek_r1",
        "data.paths": f"[{directory / 'champ.jsonl'}]",
        "data.seq_length": 2048 if on_gpu else 384,
        "parallel.ep_size": arguments.processes,
        "precision.compute": "bf16" if on_gpu else "fp32",
        "optimizer.lr": 1e-5,
        "train.device": arguments.device,
        "train.global_batch_size": arguments.processes,
        "train.num_epochs": 1000,
        "train.num_steps": 1_000_000,
        "checkpoint.every_steps": arguments.every,
        "checkpoint.keep_last": 2,
        "output.dir": directory / "output",
        "log.dir": directory / "log",
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", str(arguments.processes), "-m", "megatron_dsv3.cli"]
    job = ["train", str(QUICKSTART / "job.yaml")]
    return [*torchrun, *job, *(f"{key}={value}" for key, value in settings.items())]


def soak(run: Sequence[str], directory: Path, *, seconds: float) -> Result:
    """Starts, kills a rank after half the time, starts again, and stops by a signal."""
    log, checkpoints = directory / "log", directory / "output-checkpoints"
    with Training(run, directory / "first.txt") as first:
        first.wait_until(lambda: steps_of(log), "its first step")
        time.sleep(seconds / 2)
        first.wait_until(lambda: find_newest(checkpoints).path, "a checkpoint")
        before = steps_of(log)
        os.kill(first.ranks()[-1], signal.SIGKILL)
        killed = time.monotonic()
        first.process.wait(PATIENCE_S)
        seconds_to_end = time.monotonic() - killed
    newest = find_newest(checkpoints).path
    assert newest is not None
    resumed, restarted = step_of(newest), time.time()
    with Training(run, directory / "second.txt") as second:
        second.wait_until(
            lambda: (
                (log / "metrics.jsonl").stat().st_mtime > restarted
                and max(steps_of(log), default=0) > resumed
            ),
            "its first step",
        )
        seconds_to_step = time.time() - restarted
        time.sleep(seconds / 2)
        for rank in second.ranks():
            os.kill(rank, signal.SIGTERM)
        second.process.wait(PATIENCE_S)
    after = steps_of(log)
    twice = [step for step in before if step > resumed]
    if not (checkpoints / REQUEUE_FILE).is_file() or not twice or max(after) < max(twice):
        raise SystemExit(f"the second start did not do what was lost, or left no checkpoint: {log}")
    return Result(
        killed_after=max(before),
        resumed_from=resumed,
        last_step=max(after),
        seconds_to_end=seconds_to_end,
        seconds_to_step=seconds_to_step,
        apart=max(abs(after[step].loss / before[step].loss - 1) for step in twice),
    )


def steps_of(log: Path) -> dict[int, StepRecord]:
    """What was logged so far, by step."""
    if not (log / "metrics.jsonl").is_file():
        return {}
    return {record.step: record for record in read_metrics(log)}


class Training:
    """A job under torchrun; whatever is left of it is ended on the way out."""

    def __init__(self, run: Sequence[str], says: Path) -> None:
        self.says = says
        with says.open("wb") as file:
            self.process = subprocess.Popen(
                run, stdout=file, stderr=file, env=os.environ | {"PYTHONPATH": path()}
            )

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            for pid in [*self.ranks(), self.process.pid]:
                os.kill(pid, signal.SIGKILL)
            self.process.wait()

    def ranks(self) -> list[int]:
        """Process ids in order of rank."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        found = {}
        for child in map(int, children):
            entries = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found.update({int(e[5:]): child for e in entries if e.startswith(b"RANK=")})
        return [found[rank] for rank in sorted(found)]

    def wait_until(self, happened: Callable[[], object], what: str) -> None:
        """Raises SystemExit where the job ends before, or takes too long."""
        end = time.monotonic() + PATIENCE_S
        while not happened():
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"no sign of {what}: see {self.says}")
            time.sleep(0.2)


if __name__ == "__main__":
    main()
