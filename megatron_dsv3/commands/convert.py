"""A conversion from the command line: options, progress bar, summary."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from megatron_dsv3.convert import offline
from megatron_dsv3.convert.memory import Budget
from megatron_dsv3.convert.offline import Direction, Outcome, Share

DEFAULT_MAX_MEMORY = "4GB"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B|)", re.IGNORECASE)
_NODE_VARIABLES = ("SLURM_PROCID", "SLURM_NTASKS")
"""Set for each task that srun starts; of several tasks on one node each takes its own share."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What a conversion may take, and which part of it this process does."""

    budget: Budget
    share: Share
    finalize: bool = False
    """Write nothing but what comes after all files of tensors."""


def parse_size(text: str) -> int:
    """`8GB`, `500MiB` or a number of bytes."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r}: expected a size such as 8GB, 500MiB or 1000000")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def share_of(
    node_rank: int | None, num_nodes: int | None, environment: Mapping[str, str] = os.environ
) -> Share:
    """This node's share: as given, else as Slurm says, else all of it."""
    if node_rank is None and num_nodes is None:
        rank, size = (environment.get(name) for name in _NODE_VARIABLES)
        return Share(int(rank), int(size)) if rank and size else Share()
    if node_rank is None or num_nodes is None:
        raise ValueError("--node-rank and --num-nodes: give both or none of them")
    return Share(node_rank, num_nodes)


def run(direction: Direction, out: Path, resources: Resources, console: Console) -> Outcome | None:
    """Converts and says how it went; None: only the end was asked for.

    Raises:
        ValueError: Something is wrong with source, target or machine; one message.
    """
    if resources.finalize:
        offline.finalize(direction, out)
        console.print(f"{out}: complete")
        return None
    with _bar(console) as bar:
        task = bar.add_task("converting", total=None, speed="", memory="")

        def show(progress: offline.Progress) -> None:
            speed = f"{(bar.tasks[0].speed or 0) / 1e9:.2f} GB/s"
            memory = f"{progress.memory_bytes / 1e9:.1f} GB memory"
            bar.update(
                task,
                completed=progress.done_bytes,
                total=progress.total_bytes,
                speed=speed,
                memory=memory,
            )

        outcome = offline.convert(
            direction, out, budget=resources.budget, share=resources.share, on_progress=show
        )
    _summarise(outcome, out, resources.share, console)
    return outcome


def _bar(console: Console) -> Progress:
    columns = ("{task.description}", "{task.fields[speed]}", "{task.fields[memory]}")
    first, *rest = (TextColumn(text) for text in columns)
    return Progress(
        first, BarColumn(), TaskProgressColumn(), *rest, TimeRemainingColumn(), console=console
    )


def _summarise(outcome: Outcome, out: Path, share: Share, console: Console) -> None:
    speed = outcome.written_bytes / max(outcome.seconds, 1e-9) / 1e9
    console.print(
        f"{outcome.written_bytes:,} bytes in {outcome.seconds:.0f} s ({speed:.2f} GB/s), at most "
        f"{outcome.peak_memory_bytes / 1e9:.2f} GB of memory"
    )
    if outcome.is_finished:
        console.print(f"{out}: complete")
    else:
        console.print(
            f"node {share.rank} of {share.num_nodes} is done; the last node completes {out}, or "
            f"--finalize does once all have ended"
        )
