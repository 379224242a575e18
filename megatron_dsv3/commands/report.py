"""`megatron-dsv3 report`: figures and a page of runs, finished or still running."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_dsv3.train.report_page import write_report
from megatron_dsv3.train.run_log import RunLog, read_runs, summary


def run(directories: Sequence[Path], console: Console, *, out: Path | None = None) -> None:
    """Writes the report and shows its summary.

    Args:
        directories: Where the runs log to.
        console: For the summary and the path.
        out: Directory to write to; None: `report` in the directory of the only run.

    Raises:
        ValueError: A run cannot be read, or no place to write to is given or usable.
    """
    if out is None and len(directories) > 1:
        raise ValueError(f"{len(directories)} runs have no common place; give one with --out DIR")
    runs = read_runs(directories)
    page = write_report(runs, out or directories[0] / "report")
    console.print(_table(runs))
    console.print(f"wrote {page}", markup=False, highlight=False, soft_wrap=True)


def _table(runs: Sequence[RunLog]) -> Table:
    summaries = [summary(run) for run in runs]
    table = Table()
    table.add_column("", no_wrap=True)
    for run in runs:
        table.add_column(run.name, justify="right", overflow="fold")
    for label in summaries[0]:
        table.add_row(label, *(texts[label] for texts in summaries))
    return table
