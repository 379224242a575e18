"""A progress bar for a terminal."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from megatron_dsv3.train.metrics import Sink, StepRecord


class ProgressSink(Sink):
    """Steps done and time left; on anything but a terminal it shows nothing."""

    def __init__(self, console: Console, num_steps: int) -> None:
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("training", total=num_steps, loss="-")
        self.progress.start()

    def log(self, record: StepRecord) -> None:
        """Moves the bar."""
        self.progress.update(self.task, completed=record.step, loss=f"{record.loss:.4f}")

    def close(self) -> None:
        """Takes the bar away."""
        self.progress.stop()
