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
from megatron_dsv3.data.pipeline import History, OnBadRow, SampleOptions, TooLong

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
    show: Annotated[int, typer.Option(help="Samples to print, counted tokens coloured.")] = 0,
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
