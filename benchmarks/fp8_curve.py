"""Loss curves of FP8 and bf16 training from the same weights on the quickstart's data, on one GPU.

    python benchmarks/fp8_curve.py [--steps 300] [--dir build/fp8] [--picture docs/pictures/fp8.png]

The model has DeepSeek-V3's head sizes and 0.86 B parameters, random at first. bf16 runs twice: sums
on a GPU come in any order, so that is how far apart equal trainings are. All runs share the card.
A run whose steps are all there is not made again. A step has one row of 2048 tokens: 300 of them
are nine rounds of the data; after more, or with `--lr 1e-4`, the loss is that of sentences known by
heart.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dsv3.train.metrics import StepRecord, read_metrics

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
MODEL: Mapping[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 5632, "moe_intermediate_size": 1024,
    "num_hidden_layers": 4, "first_k_dense_replace": 1, "n_routed_experts": 8,
    "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": 1024, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
RUNS: Mapping[str, str] = {"bf16": "off", "bf16 again": "off", "FP8 blockwise": "blockwise"}
STYLES = (("#1f6fb2", "-", 2.6), ("#9aa7b4", "-", 1.4), ("#d1495b", (0, (4, 3)), 1.6))
WINDOW = 20
"""Steps whose losses are averaged: one step's samples say more of its loss than the precision."""


def main() -> None:
    """Trains what is missing, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-5, help="at its largest")
    parser.add_argument("--bias", default="decay", help="experts.bias of the job")
    parser.add_argument("--dir", type=Path, default=ROOT / "build" / "fp8")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "pictures" / "fp8.png")
    arguments = parser.parse_args()
    logs = {name: arguments.dir / name.replace(" ", "_") for name in RUNS}
    missing = [name for name, log in logs.items() if not is_done(log, arguments.steps)]
    if missing:
        prepare(arguments.dir)
    trainings = [start(arguments, logs[n], RUNS[n]) for n in missing]
    codes = [training.wait() for training in trainings]
    if any(codes):
        raise SystemExit(f"a training failed: see the files log.txt under {arguments.dir}")
    curves = {name: read_metrics(log / "log") for name, log in logs.items()}
    reference = smooth(curves["bf16"])
    print(f"losses averaged over {WINDOW} steps, against bf16")
    print(f"{'':15} first step  last mean  largest difference  mean difference")
    for name, records in curves.items():
        apart = np.abs(smooth(records) / reference - 1)
        print(
            f"{name:15} {records[0].loss:10.4f} {smooth(records)[-1]:10.4f} "
            f"{apart.max():19.2%} {apart.mean():16.2%}"
        )
    losses = {name: [record.loss for record in records] for name, records in curves.items()}
    arguments.picture.with_suffix(".json").write_text(json.dumps(losses) + "\n")
    draw(curves, arguments.picture)
    print(f"wrote {arguments.picture}")


def prepare(directory: Path) -> None:
    """Model and data, where they are not there yet."""
    functions = runpy.run_path(str(QUICKSTART / "prepare.py"))
    if not (directory / "model" / "tokenizer.json").is_file():
        directory.mkdir(parents=True, exist_ok=True)
        count = functions["write_model"](directory / "model", MODEL)
        print(f"{count / 1e9:.2f} B parameters, copies of the MTP layer included")
    if not (directory / "champ.jsonl").is_file():
        functions["write_champ"](directory / "champ.jsonl")


def is_done(directory: Path, num_steps: int) -> bool:
    """Whether a run's steps are all there."""
    log = directory / "log"
    return (log / "metrics.jsonl").is_file() and len(read_metrics(log)) == num_steps


def start(arguments: argparse.Namespace, run: Path, fp8: str) -> subprocess.Popen[bytes]:
    """One training in a process of its own."""
    directory = arguments.dir
    settings = {
        "model.hf_dir": directory / "model",
        "data.store": "null",
        "data.template": "deepseek_r1",
        "data.paths": f"[{directory / 'champ.jsonl'}]",
        "data.seq_length": 2048,
        "parallel.ep_size": 1,
        "precision.compute": "bf16",
        "precision.fp8": fp8,
        "optimizer.lr": arguments.lr,
        "schedule.warmup_steps": 20,
        "experts.bias": arguments.bias,
        "train.device": "cuda",
        "train.global_batch_size": 1,
        "train.num_epochs": 1000,
        "train.num_steps": arguments.steps,
        "checkpoint.every_steps": "null",
        "output.dir": run / "output",
        "output.dtype": "bf16",
        "log.dir": run / "log",
    }
    run.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "megatron_dsv3.cli", "train", str(QUICKSTART / "job.yaml")]
    overrides = [f"{key}={value}" for key, value in settings.items()]
    with (run / "log.txt").open("wb") as log:
        return subprocess.Popen(
            [*command, *overrides], stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": path()}
        )


def path() -> str:
    """This checkout before all else."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def smooth(records: Sequence[StepRecord]) -> np.ndarray:
    """Mean of every `WINDOW` consecutive losses."""
    losses = [record.loss for record in records]
    return np.convolve(losses, np.full(WINDOW, 1 / WINDOW), mode="valid")


def draw(curves: Mapping[str, Sequence[StepRecord]], picture: Path) -> None:
    """Averaged losses above, relative difference from the first run below."""
    # A machine with a card need not have it: draw elsewhere.
    import matplotlib.pyplot as plt
    from drawing import finish

    figure, (top, bottom) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1), layout="constrained"
    )
    reference = smooth(next(iter(curves.values())))
    steps = np.arange(len(reference)) + WINDOW
    for (name, records), (color, dash, width) in zip(curves.items(), STYLES, strict=True):
        top.plot(steps, smooth(records), color=color, ls=dash, lw=width, label=name)
        bottom.plot(steps, 100 * (smooth(records) / reference - 1), color=color, ls=dash, lw=width)
    top.set(ylabel=f"loss, mean of {WINDOW} steps", title="0.86 B parameters, one H100")
    top.legend(frameon=False)
    bottom.axhspan(-1, 1, color="#9aa7b4", alpha=0.2, lw=0)
    bottom.set(xlabel="step", ylabel="difference\nfrom bf16, %")
    finish(figure, (top, bottom), picture)


if __name__ == "__main__":
    main()
