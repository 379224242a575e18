"""Loss curves of several layouts on the quickstart's model and data, and how far they lie apart.

    python benchmarks/layouts.py [--steps 30] [--dir DIR] [--picture docs/pictures/curves.png]

Trains the same job on CPU processes in every layout, prints the largest differences from one
process, and draws them. About 5 minutes on 2 cores; a layout whose steps are all there is not
trained again, so that the picture can be drawn anew.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from drawing import finish

from megatron_dsv3.train.metrics import StepRecord, read_metrics

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
LAYOUTS: Mapping[str, tuple[int, Mapping[str, int]]] = {
    "one process": (1, {}),
    "TP2 with sequence parallelism": (2, {"tp_size": 2}),
    "PP2, EP2, DP2": (4, {"pp_size": 2, "ep_size": 2}),
}
STYLES = (("#9aa7b4", "-", 6.0), ("#1f6fb2", "-", 2.2), ("#d1495b", (0, (4, 4)), 1.6))
"""Color, dash and width: what is drawn first stays visible under what follows."""
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
}


def main() -> None:
    """Trains what is missing, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--dir", type=Path, default=ROOT / "build" / "layouts")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "pictures" / "curves.png")
    arguments = parser.parse_args()
    if not (arguments.dir / "champ.jsonl").is_file():
        run([sys.executable, str(QUICKSTART / "prepare.py"), str(arguments.dir)])
    runs = {
        name: train(arguments.dir, f"run{number}", arguments.steps, *layout)
        for number, (name, layout) in enumerate(LAYOUTS.items())
    }
    reference, *others = runs.values()
    print(f"{'largest relative difference from one process':46} loss      mtp loss  grad norm")
    for name, records in zip(list(runs)[1:], others, strict=True):
        errors = [
            difference(records, reference, key).max() for key in ("loss", "mtp_loss", "grad_norm")
        ]
        print(f"{name:46} " + "   ".join(f"{error:.1e}" for error in errors))
    draw(runs, arguments.picture)
    print(f"wrote {arguments.picture}")


def train(
    directory: Path, name: str, num_steps: int, num_processes: int, sizes: Mapping[str, int]
) -> list[StepRecord]:
    """The records of one run of the quickstart's job in this layout."""
    log = directory / name / "log"
    if (log / "metrics.jsonl").is_file() and len(done := read_metrics(log)) == num_steps:
        return done
    settings = {
        "model.hf_dir": directory / "model",
        "data.store": "null",
        "data.template": "deepseek_r1",
        "data.paths": f"[{directory / 'champ.jsonl'}]",
        "parallel.ep_size": 1,  # the quickstart's own layout is another one
        # A bias moves by a whole step, by a sign: that would magnify what rounding decides.
        "experts.bias": "freeze",
        **{f"parallel.{key}": value for key, value in sizes.items()},
        "train.num_steps": num_steps,
        "output.dir": directory / name / "out",
        "log.dir": log,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc-per-node={num_processes}", "-m", "megatron_dsv3.cli"]
    run([*launcher, "train", str(QUICKSTART / "job.yaml"), *overrides])
    return read_metrics(log)


def run(command: Sequence[str]) -> None:
    """Stops with the command's own output where it fails."""
    subprocess.run(command, check=True, env=os.environ | ENVIRONMENT)


def difference(
    records: Sequence[StepRecord], reference: Sequence[StepRecord], key: str
) -> np.ndarray:
    """Relative, by step."""
    ours, theirs = (np.array([getattr(r, key) for r in rs]) for rs in (records, reference))
    return np.abs(ours - theirs) / np.abs(theirs)


def draw(runs: Mapping[str, Sequence[StepRecord]], path: Path) -> None:
    """Loss above, relative difference from the first run below."""
    figure, (top, bottom) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1), layout="constrained"
    )
    reference = next(iter(runs.values()))
    for (name, records), (color, dash, width) in zip(runs.items(), STYLES, strict=True):
        steps = [record.step for record in records]
        losses = [record.loss for record in records]
        top.plot(steps, losses, color=color, ls=dash, lw=width, label=name)
        if records is not reference:
            # Equal to the last bit is no point on a logarithmic axis.
            apart = difference(records, reference, "loss").clip(1e-9)
            bottom.semilogy(steps, apart, ".", color=color, ms=6)
    top.set(ylabel="loss", title="The same training in three layouts, fp32 on CPUs")
    top.legend(frameon=False)
    bottom.set(xlabel="step", ylabel="relative difference\nfrom one process", ylim=(5e-10, 1e-3))
    finish(figure, (top, bottom), path)


if __name__ == "__main__":
    main()
