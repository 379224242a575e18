"""The command line. What a user can cause ends with one message and exit code 2, no traceback."""

import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from megatron_dsv3.commands.bench_cli import bench
from megatron_dsv3.commands.plan_cli import plan
from megatron_dsv3.commands.serve_cli import serve
from megatron_dsv3.config.job import load_job
from megatron_dsv3.data.pipeline import History, OnBadRow, SampleOptions, TooLong

app = typer.Typer(
    name="megatron-dsv3",
    help="Fine-tune DeepSeek-V3 / R1 with all parameters on Megatron-Core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(serve, name="serve")
app.command()(bench)
app.add_typer(plan, name="plan")
USER_ERROR = 2
JOB_SUFFIXES = (".yaml", ".yml")
DIFFERENT = 1
PreflightStep = Literal["report", "choose", "links"]


@app.command()
def train(
    job: Annotated[Path, typer.Argument(help="Job file (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings that replace the file's: section.name=value ..."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and build the shapes; no start.")
    ] = False,
    processes: Annotated[
        int, typer.Option(help="With --dry-run: of the training, one a GPU.", min=1)
    ] = 1,
) -> None:
    """Fine-tune a model and write the Hugging Face directory; alone or under torchrun."""
    settings = load_job(job, overrides or [])
    # Imported here, so that --help and mistakes in the job don't wait for torch and Megatron-Core.
    if dry_run:
        from megatron_dsv3.commands import dry_run as check

        check.run(settings, Console(), num_processes=processes)
        return
    from megatron_dsv3.commands import train as command

    command.run(settings, Console())


@app.command()
def prepare(
    model: Annotated[
        Path, typer.Option(help="Hugging Face directory with the tokenizer.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Where the store will be.", show_default=False)],
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Chat files (JSON, JSONL, .gz or .zst of them, Parquet), directories, patterns; "
            "none: --show what is in the store already.",
            show_default=False,
        ),
    ] = None,
    template: Annotated[
        str,
        typer.Option(help="deepseek_v3, deepseek_v3_0324, deepseek_r1, deepseek_v3_1, tokenizer."),
    ] = "deepseek_v3",
    seq_length: Annotated[int, typer.Option(help="Most tokens of a sample.")] = 32768,
    history_reasoning: Annotated[
        History,
        typer.Option(help="Reasoning of earlier turns; expand: one sample a turn, as when served."),
    ] = "strip",
    too_long: Annotated[TooLong, typer.Option(help="What becomes of longer samples.")] = "drop",
    on_bad_row: Annotated[
        OnBadRow, typer.Option(help="What becomes of what cannot be read.")
    ] = "error",
    workers: Annotated[
        int | None, typer.Option(help="Processes; by default one a CPU.", show_default=False)
    ] = None,
    show: Annotated[
        int, typer.Option(min=0, help="Samples to print, counted tokens coloured.")
    ] = 0,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a complete store.")] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run Python code that comes with the tokenizer."),
    ] = False,
) -> None:
    """Tokenise chat files into a store for training, and report what is in it."""
    if not paths and not show:
        raise ValueError("no input: name chat files, or --show N to look into a store")
    # Imported here, so that --help doesn't wait for transformers.
    from megatron_dsv3.commands import prepare as command

    if not paths:
        command.look(
            out, Console(), hf_dir=model, num_shown=show, trust_remote_code=trust_remote_code
        )
        return
    from megatron_dsv3.data.prepare import PrepareOptions

    options = PrepareOptions(
        template=template,
        samples=SampleOptions(
            seq_length=seq_length, too_long=too_long, history_reasoning=history_reasoning
        ),
        on_bad_row=on_bad_row,
        num_workers=workers,
        replace=replace,
    )
    command.run(
        paths,
        out,
        options,
        Console(),
        hf_dir=model,
        trust_remote_code=trust_remote_code,
        num_shown=show,
    )


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Log directories of runs, finished or running.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write; by default RUN/report. Needed for several runs."),
    ] = None,
) -> None:
    """Draw runs: loss, learning rate, gradient norm, throughput, experts; PNG files and a page."""
    from megatron_dsv3.commands import report as command

    command.run(runs, Console(), out=out)


@app.command()
def verify(
    reference: Annotated[
        Path,
        typer.Argument(
            help="Hugging Face directory or Megatron checkpoint: what is right.",
            show_default=False,
        ),
    ],
    other: Annotated[
        Path | None,
        typer.Argument(
            help="A checkpoint of either kind, or a job file (.yaml, .yml); none: is the first "
            "one, written by training, whole?",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="With a job: settings that replace the file's, section.name=value ..."),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(help="Of two checkpoints: relative error of a tensor that passes.", min=0),
    ] = 0.0,
    workers: Annotated[int, typer.Option(help="Of two checkpoints: threads.", min=1)] = 2,
) -> None:
    """Compare two checkpoints, or a job's model with transformers' layers; or check one checkpoint.

    Exit code 1 where two checkpoints differ. A job's model is compared in its layout, alone or
    under torchrun.
    """
    if other is None:
        from megatron_dsv3.commands import verify_checkpoint as whole

        console = Console()
        whole.run(reference, lambda line: console.print(line, markup=False, soft_wrap=True))
        return
    if other.suffix in JOB_SUFFIXES:
        settings = load_job(other, overrides or [])
        from megatron_dsv3.commands import verify as gate

        gate.run(reference, settings, Console())
        return
    if not other.is_dir():
        kinds = ", ".join(JOB_SUFFIXES)
        raise ValueError(f"{other}: expected a job file ({kinds}) or a checkpoint's directory")
    if overrides:
        raise ValueError(f"{other} is no job file; nothing can be set on it: {overrides}")
    from megatron_dsv3.commands import compare

    if not compare.run(reference, other, Console(), tolerance=tolerance, workers=workers):
        raise typer.Exit(DIFFERENT)


@app.command()
def preflight(
    job: Annotated[Path | None, typer.Argument(help="Job file (YAML).", show_default=False)] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings that replace the file's: section.name=value ..."),
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Without a job: tell what this machine brings.")
    ] = False,
    step: Annotated[
        PreflightStep | None,
        typer.Option(
            help="Of a check of many nodes: report (on each), choose (on one), links (under "
            "torchrun on the chosen ones); none: all at once, in the processes that run.",
            show_default=False,
        ),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Of the steps: folder that all nodes see.", show_default=False),
    ] = None,
    node: Annotated[
        str | None, typer.Option(help="report: name of this node.", show_default=False)
    ] = None,
    nodes: Annotated[
        str, typer.Option(help="choose, links: names of the nodes, parted by commas.")
    ] = "",
    needed: Annotated[
        int | None,
        typer.Option(help="choose: how many of them; the rest are spares.", show_default=False),
    ] = None,
    floor: Annotated[
        float | None,
        typer.Option(help="Least GB/s a rank between nodes; 10 of GPUs.", show_default=False),
    ] = None,
    floor_inside: Annotated[
        float | None,
        typer.Option(help="Least GB/s a rank within a node; 100 of GPUs.", show_default=False),
    ] = None,
) -> None:
    """Check the nodes of a job before it starts; alone, under torchrun, or in steps."""
    console = Console()
    if local or job is None:
        if not local or job is not None:
            raise ValueError("preflight: expected a job file, or --local for this machine alone")
        from megatron_dsv3.commands import preflight as command

        command.run_local(console)
        return
    settings = load_job(job, overrides or [])
    from megatron_dsv3.commands import preflight as command

    floors = command.floors(settings, across=floor, inside=floor_inside)
    if step is None:
        command.at_once(settings, console, floors)
        return
    if directory is None:
        raise ValueError(f"--step {step} needs --dir, a folder that all nodes see")
    names = [name for name in nodes.split(",") if name]
    if step == "report":
        command.report(settings, directory, node or socket.gethostname())
    elif not names:
        raise ValueError(f"--step {step} needs --nodes, names parted by commas")
    elif step == "choose":
        command.choose_nodes(settings, directory, names, console, needed=needed or len(names))
    else:
        command.links(settings, directory, names, console, floors)


@app.command()
def examples(
    out: Annotated[Path, typer.Option(help="New or empty directory.", show_default=False)],
) -> None:
    """Write the jobs, scripts and the converter that come with this version, to start from."""
    from megatron_dsv3.commands import examples as command

    for path in command.run(out):
        typer.echo(path)


def main() -> None:
    """Entry point of the console script."""
    with user_errors():
        app()


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns what a user can cause into one message and exit code 2."""
    _quiet_imports()
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if _speaks_for(error):
            print(f"error: {error}", file=sys.stderr)  # noqa: T201 - this is the command line
        sys.exit(USER_ERROR)


def _speaks_for(error: Exception) -> bool:
    """Whether this process reports the error: rank 0 does where all ranks meet the same one."""
    if os.environ.get("RANK", "0") == "0":
        return True
    from megatron_dsv3.model.groups import RankError

    return isinstance(error, RankError)


def _quiet_imports() -> None:
    """Megatron-Core warns at import of every optional package that is not installed."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for name in ("megatron", "torch", "transformers", "numexpr"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


if __name__ == "__main__":
    main()
