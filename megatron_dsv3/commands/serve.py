"""`megatron-dsv3 serve`: is a directory servable, a server of it, a request to one that runs."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_dsv3.serve.hf_check import Finding, refuse_unservable


def check(directory: Path, console: Console) -> None:
    """Shows what whoever serves the directory should know.

    Raises:
        ValueError: vLLM cannot serve it; everything in the way is listed.
    """
    findings = refuse_unservable(directory)
    show(findings, console)
    console.print(f"{directory}: servable", highlight=False, markup=False, soft_wrap=True)


def show(findings: Sequence[Finding], console: Console) -> None:
    """A line for each finding."""
    for finding in findings:
        console.print(f"note: {finding}", highlight=False, markup=False, soft_wrap=True)
