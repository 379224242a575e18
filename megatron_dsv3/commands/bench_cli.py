"""The options of `megatron-dsv3 bench`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def bench(
    only: Annotated[
        list[str] | None,
        typer.Option(help="A case, `*` for any part of its name; may be repeated. Default: all."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps measured after the warm-up.", min=1)] = 10,
    profile: Annotated[
        list[str] | None,
        typer.Option(help="A case taken apart by kind of kernel; may be repeated."),
    ] = None,
    limit_gib: Annotated[
        float | None,
        typer.Option(help="Memory that may be taken, to see what fits a smaller card.", min=1),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File for all figures.")] = None,
    picture: Annotated[Path | None, typer.Option(help="File for a picture of them.")] = None,
) -> None:
    """Time the training step on slices of DeepSeek-V3 on this machine's GPU: speed, MFU, memory."""
    # Imported here, so that --help does not wait for torch and Megatron-Core.
    from megatron_dsv3.commands import bench as command

    request = command.Request(
        only=only or (),
        steps=steps,
        profile=profile or (),
        limit_gib=limit_gib,
        json=json,
        picture=picture,
    )
    command.run(request, Console())
