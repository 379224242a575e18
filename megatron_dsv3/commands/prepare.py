"""`megatron-dsv3 prepare`: from chat files to a store, with a report; or a look into a store."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

from megatron_dsv3.data.fingerprints import tokenizer_fingerprint
from megatron_dsv3.data.manifest import read_manifest
from megatron_dsv3.data.prepare import PrepareOptions, Progress, prepare
from megatron_dsv3.data.report import Report
from megatron_dsv3.data.show import show
from megatron_dsv3.data.store import REPORT, Store
from megatron_dsv3.data.templates import Special
from megatron_dsv3.data.tokens import load_tokenizer

# What was copied from R1's raw output lacks the <think> that its prompt ends with.
_HINTS = {Special.THINK_END.value: "; is it the end of reasoning whose <think> is missing?"}


def run(
    paths: Sequence[Path],
    target: Path,
    options: PrepareOptions,
    console: Console,
    *,
    hf_dir: Path,
    trust_remote_code: bool = False,
    num_shown: int = 0,
) -> None:
    """Writes the store and says what is in it.

    Args:
        paths: Files, directories, patterns.
        target: Where the store will be.
        options: What to make of the files.
        console: For progress, table and samples.
        hf_dir: Where the tokenizer is.
        trust_remote_code: Whether Python code that comes with the tokenizer may run.
        num_shown: Samples to print with their counted tokens coloured.

    Raises:
        ValueError: See `data.prepare.prepare`.
    """
    tokenizer = load_tokenizer(hf_dir, trust_remote_code=trust_remote_code)
    columns: list[ProgressColumn] = [
        # Narrow, so that 80 columns hold it all.
        BarColumn(bar_width=10),
        DownloadColumn(),
        TextColumn("{task.fields[rows]:,} rows"),
        TextColumn("{task.fields[rate]:,.0f} rows/s"),
        TimeRemainingColumn(),
        TextColumn("left"),
    ]
    shown = console.is_terminal
    with Bar(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("reading", total=None, rows=0, rate=0.0)

        def on_progress(progress: Progress) -> None:
            elapsed = bar.tasks[0].elapsed or math.inf
            bar.update(
                task,
                total=progress.size,
                completed=progress.num_read,
                rows=progress.rows,
                rate=progress.rows / elapsed,
            )

        with _system_errors(target):
            report = prepare(
                paths, target, tokenizer=tokenizer, options=options, on_progress=on_progress
            )
    console.print(report_table(report))
    for line in _remarks(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    _print_samples(target, tokenizer, console, num_shown)
    console.print(f"wrote {target}, report in {target / REPORT}", highlight=False, soft_wrap=True)


@contextmanager
def _system_errors(target: Path) -> Iterator[None]:
    """A full disk, a file that may not be read: for a user to mend, so no traceback."""
    try:
        yield
    except OSError as error:
        # Those that this project raises say all themselves.
        of_system = error.errno is not None
        problem = f"{error.filename or target}: {error.strerror}" if of_system else str(error)
        raise ValueError(problem) from error


def look(
    store: Path,
    console: Console,
    *,
    hf_dir: Path,
    num_shown: int,
    trust_remote_code: bool = False,
) -> None:
    """Prints samples of a store that is there already.

    Raises:
        ValueError: There is no complete store, or it was made with another tokenizer.
    """
    tokenizer = load_tokenizer(hf_dir, trust_remote_code=trust_remote_code)
    manifest = read_manifest(store)
    if manifest is not None and manifest.recipe.tokenizer != tokenizer_fingerprint(tokenizer):
        raise ValueError(f"{store}: made with another tokenizer than that of {hf_dir}")
    _print_samples(store, tokenizer, console, num_shown)


def _print_samples(store: Path, tokenizer: object, console: Console, num_shown: int) -> None:
    if not num_shown:
        return
    color = console.color_system is not None
    for text in show(Store(store), tokenizer, num_shown, color=color):
        console.print(text, soft_wrap=True, highlight=False)


def report_table(report: Report) -> Table:
    """The counts of a report; one row a count, reasons indented below what they explain."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for label, count in _lines(report):
        table.add_row(label, count)
    return table


def _lines(report: Report) -> list[tuple[str, str]]:
    rows, samples, tokens, packing = report.rows, report.samples, report.tokens, report.packing
    share = tokens.counted / tokens.kept
    lengths = report.length_quantiles
    return [
        ("rows read", f"{rows.read:,}"),
        *((f"  {schema}", f"{count:,}") for schema, count in rows.schemas.items()),
        ("rows kept", f"{rows.kept:,}"),
        ("rows skipped", f"{rows.faulty + rows.without_sample:,}"),
        *((f"  {reason}", f"{count:,}") for reason, count in report.faults.by_reason.items()),
        ("files given up in the middle", f"{report.faults.files_given_up:,}"),
        ("samples kept", f"{samples.kept:,}"),
        ("  truncated", f"{samples.truncated:,}"),
        ("samples dropped", f"{sum(samples.dropped.values()):,}"),
        *((f"  {reason}", f"{count:,}") for reason, count in samples.dropped.items()),
        ("tokens", f"{tokens.kept:,}"),
        ("  counted for the loss", f"{tokens.counted:,} ({share:.1%})"),
        ("tokens lost for their length", f"{tokens.lost:,}"),
        ("tokens a sample: median, longest", f"{lengths['0.5']:,}, {lengths['1']:,}"),
        (f"packs of {packing.row_length:,} tokens", f"{packing.rows:,}"),
        ("  full", f"{packing.fill:.2%}"),
        ("seconds", f"{report.seconds:,.1f}"),
    ]


def _remarks(report: Report) -> list[str]:
    return [
        *(f"not written: {what}: {count:,}" for what, count in report.not_written.items()),
        *(
            f"kept as text: {token} in the words of {count:,} samples{_HINTS.get(token, '')}"
            for token, count in report.spelled.items()
        ),
        *(f"did not fit: {name}: {length:,} tokens" for name, length in report.samples.longest),
        *(f"skipped: {message}" for message in report.faults.examples),
        *(f"ignored: {path}" for path in report.ignored_files),
    ]
