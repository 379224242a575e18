"""The command line. What a user can cause ends with one message and exit code 2, no traceback."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megatron_dsv3.config.job import load_job

app = typer.Typer(
    name="megatron-dsv3",
    help="Fine-tune DeepSeek-V3 / R1 with all parameters on Megatron-Core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
USER_ERROR = 2


@app.command()
def train(
    job: Annotated[Path, typer.Argument(help="Job file (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings that replace the file's: section.name=value ..."),
    ] = None,
) -> None:
    """Fine-tune a model and write the Hugging Face directory; alone or under torchrun."""
    settings = load_job(job, overrides or [])
    # Imported here, so that --help and mistakes in the job don't wait for torch and Megatron-Core.
    from megatron_dsv3.commands import train as command

    command.run(settings, Console())


@app.command()
def verify(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A training's checkpoint, or the folder of them (the newest is taken).",
            show_default=False,
        ),
    ],
) -> None:
    """Check that a checkpoint is whole: every file's hash, every tensor's header."""
    from megatron_dsv3.commands import verify_checkpoint as command

    console = Console()
    command.run(checkpoint, lambda line: console.print(line, markup=False, soft_wrap=True))


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
