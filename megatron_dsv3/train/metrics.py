"""What a step was, as one line with fixed keys, as JSON lines, and for TensorBoard."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from megatron_dsv3.train.run_log import read_records

ExpertLoads = Mapping[int, Sequence[int]]
"""Tokens of every expert, by layer (MTP layers count on after the decoder's)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step's figures; None where the job has no such thing."""

    step: int
    """From 1."""
    num_steps: int
    epoch: float
    """Epochs done after this step."""
    loss: float
    mtp_loss: float | None
    lr: float
    grad_norm: float
    """Before clipping."""
    seconds: float
    tokens: int
    """Real tokens of the global batch."""
    counted_tokens: int
    """Tokens with loss."""
    num_devices: int
    tflops_per_device: float
    """Model FLOPs of the real tokens (causal attention) per second and device."""
    mfu: float | None
    """`tflops_per_device` over the device's bf16 peak; None where that is not known."""
    peak_memory_gib: float | None
    """Highest use of device memory so far on this rank; None on a CPU."""
    expert_balance: float
    """Largest expert load over the mean; 1 is perfect."""
    validation_loss: float | None = None
    """After this step; None on steps without validation."""
    skipped: str | None = None
    """Why this step's update was left out; None: it was done."""
    num_skipped: int = 0
    """Steps left out so far."""

    @property
    def tokens_per_second(self) -> float:
        """Real tokens per second of the whole job."""
        return self.tokens / self.seconds


def step_line(record: StepRecord) -> str:
    """`step 7/60 epoch 0.12 loss 11.7702 ...`: fixed keys in fixed order, units in the keys."""
    counted_per_second = record.counted_tokens / record.seconds
    fields: Sequence[tuple[str, str | None]] = (
        ("step", f"{record.step}/{record.num_steps}"),
        ("epoch", f"{record.epoch:.2f}"),
        ("loss", f"{record.loss:.4f}"),
        ("mtp_loss", _or_none(record.mtp_loss, ".4f")),
        ("valid_loss", _or_none(record.validation_loss, ".4f")),
        ("lr", f"{record.lr:.2e}"),
        ("grad_norm", f"{record.grad_norm:.3f}"),
        ("tok/s", f"{record.tokens_per_second:,.0f}"),
        ("tok/s/device", f"{record.tokens_per_second / record.num_devices:,.0f}"),
        ("counted_tok/s", f"{counted_per_second:,.0f}"),
        ("counted_tok/s/device", f"{counted_per_second / record.num_devices:,.0f}"),
        ("TFLOP/s/device", f"{record.tflops_per_device:.3g}"),
        ("MFU", _or_none(record.mfu, ".1%")),
        ("mem_GiB", _or_none(record.peak_memory_gib, ".1f")),
        ("expert_balance", f"{record.expert_balance:.2f}"),
        ("skipped", str(record.num_skipped)),
    )
    return " ".join(f"{key} {'-' if value is None else value}" for key, value in fields)


def _or_none(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def scalars(record: StepRecord) -> dict[str, float]:
    """Figures of a step for trackers, by name; none that is not finite."""
    values = asdict(record) | {"tokens_per_second": record.tokens_per_second}
    return {
        f"train/{name}": float(value)
        for name, value in values.items()
        if isinstance(value, int | float)
        and name not in ("step", "num_steps")
        and math.isfinite(value)
    }


class Sink:
    """Takes the records of a run, on rank 0."""

    def log(self, record: StepRecord) -> None:
        """Called once a step."""

    def log_expert_load(self, step: int, loads: ExpertLoads) -> None:
        """Called now and then."""

    def close(self) -> None:
        """Called once, also after an error."""


class LineSink(Sink):
    """Step lines, handed to `write` (a terminal, a log)."""

    def __init__(self, write: Callable[[str], None], *, every_steps: int) -> None:
        self.write, self.every_steps = write, every_steps

    def log(self, record: StepRecord) -> None:
        """Writes the first, the last and every n-th step."""
        if record.step in (1, record.num_steps) or record.step % self.every_steps == 0:
            self.write(step_line(record))
        if record.skipped:
            self.write(f"step {record.step} skipped: {record.skipped}")


class FileSink(Sink):
    """`metrics.jsonl`, `expert_load.jsonl` and TensorBoard event files in one directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.lines = _append_to(directory / "metrics.jsonl")
        self.loads = _append_to(directory / "expert_load.jsonl")
        self.writer = SummaryWriter(log_dir=str(directory))

    def log(self, record: StepRecord) -> None:
        """One JSON line, flushed, and a scalar for every figure."""
        # JSON has no NaN, and most of its readers take none.
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(record).items()
        }
        self.lines.write(json.dumps(values, allow_nan=False) + "\n")
        self.lines.flush()
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record.step)

    def log_expert_load(self, step: int, loads: ExpertLoads) -> None:
        """One JSON line, and a heat map: a row a layer, bright where an expert has many tokens."""
        line = {"step": step, "layers": list(loads), "load": list(loads.values())}
        self.loads.write(json.dumps(line) + "\n")
        self.loads.flush()
        heat = np.array(list(loads.values()), np.float32)
        heat /= np.maximum(heat.max(axis=1, keepdims=True), 1)
        self.writer.add_image("train/expert_load", heat[None], step)

    def close(self) -> None:
        """Flushes all."""
        self.lines.close()
        self.loads.close()
        self.writer.close()


def _append_to(path: Path) -> TextIO:
    """Opened to add lines; half a line, where a run died while writing it, is cut off."""
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
    return path.open("a", encoding="utf-8")


def read_metrics(directory: Path) -> list[StepRecord]:
    """The records that `FileSink` wrote there: each step once, in order, NaN where one was.

    Raises:
        ValueError: There is no such file, or a damaged one.
    """
    records = read_records(directory / "metrics.jsonl")
    for record in records:
        for name in ("loss", "grad_norm"):
            record[name] = math.nan if record[name] is None else record[name]
    return [StepRecord(**record) for record in records]
