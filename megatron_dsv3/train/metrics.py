"""What a step was, as one line with fixed keys, as JSON lines, and for TensorBoard."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from torch.utils.tensorboard import SummaryWriter


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
    tflops_per_device: float
    """Model FLOPs of the real tokens (causal attention) per second and device."""
    peak_memory_gib: float | None
    """Highest use of device memory so far on this rank; None on a CPU."""
    expert_balance: float
    """Largest expert load over the mean; 1 is perfect."""

    @property
    def tokens_per_second(self) -> float:
        """Real tokens per second of the whole job."""
        return self.tokens / self.seconds


def step_line(record: StepRecord) -> str:
    """`step 7/60 epoch 0.12 loss 11.7702 ...`: fixed keys in fixed order, units in the keys."""
    fields: Sequence[tuple[str, str | None]] = (
        ("step", f"{record.step}/{record.num_steps}"),
        ("epoch", f"{record.epoch:.2f}"),
        ("loss", f"{record.loss:.4f}"),
        ("mtp_loss", None if record.mtp_loss is None else f"{record.mtp_loss:.4f}"),
        ("lr", f"{record.lr:.2e}"),
        ("grad_norm", f"{record.grad_norm:.3f}"),
        ("tok/s", f"{record.tokens_per_second:,.0f}"),
        ("counted_tok/s", f"{record.counted_tokens / record.seconds:,.0f}"),
        ("TFLOP/s/device", f"{record.tflops_per_device:.3g}"),
        ("mem_GiB", None if record.peak_memory_gib is None else f"{record.peak_memory_gib:.1f}"),
        ("expert_balance", f"{record.expert_balance:.2f}"),
    )
    return " ".join(f"{key} {'-' if value is None else value}" for key, value in fields)


class Sink(Protocol):
    """Takes the records of a run."""

    def log(self, record: StepRecord) -> None:
        """Called once a step, on rank 0."""

    def close(self) -> None:
        """Called once, also after an error."""


class LineSink:
    """Step lines, handed to `write` (a terminal, a log)."""

    def __init__(self, write: Callable[[str], None], *, every_steps: int) -> None:
        self.write, self.every_steps = write, every_steps

    def log(self, record: StepRecord) -> None:
        """Writes the first, the last and every n-th step."""
        if record.step in (1, record.num_steps) or record.step % self.every_steps == 0:
            self.write(step_line(record))

    def close(self) -> None:
        """Nothing to close."""


class FileSink:
    """`metrics.jsonl` and TensorBoard event files in one directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.lines = (directory / "metrics.jsonl").open("a", encoding="utf-8")
        self.writer = SummaryWriter(log_dir=str(directory))

    def log(self, record: StepRecord) -> None:
        """One JSON line, flushed, and a scalar for every figure."""
        self.lines.write(json.dumps(asdict(record)) + "\n")
        self.lines.flush()
        for name, value in asdict(record).items():
            if value is not None and name not in ("step", "num_steps"):
                self.writer.add_scalar(f"train/{name}", value, record.step)
        self.writer.add_scalar("train/tokens_per_second", record.tokens_per_second, record.step)

    def close(self) -> None:
        """Flushes both."""
        self.lines.close()
        self.writer.close()


def read_metrics(directory: Path) -> list[StepRecord]:
    """The records that `FileSink` wrote there, in order.

    Raises:
        ValueError: There is no such file.
    """
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the log directory of a run")
    with path.open(encoding="utf-8") as lines:
        return [StepRecord(**json.loads(line)) for line in lines]
