"""A conversion from the command line: options, progress bar, summary."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from megatron_dsv3.checkpoint.manifest import FileRecord, record_file, write_manifest
from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.convert import offline
from megatron_dsv3.convert.error_report import ErrorReport
from megatron_dsv3.convert.hf_plan import Precision
from megatron_dsv3.convert.journal import Entry, Report
from megatron_dsv3.convert.megatron_io import INDEX
from megatron_dsv3.convert.megatron_write import OBJECTS, ToMegatron
from megatron_dsv3.convert.memory import Budget, PeakMeter
from megatron_dsv3.convert.offline import Direction, Outcome, Share
from megatron_dsv3.convert.safetensors_file import explained
from megatron_dsv3.convert.sources import HFSource, MegatronSource, Source
from megatron_dsv3.convert.to_hf import SHARD_BYTES, ToHF, errors_of
from megatron_dsv3.convert.xtuner import XTunerSource
from megatron_dsv3.serve.hf_check import check_export

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B|)", re.IGNORECASE)
_NODE_VARIABLES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
"""Set for each task that srun starts; of several tasks on one node each takes its own share. Not
SLURM_NTASKS: a batch script has that, too, and runs there once, as process 0 of all its tasks."""


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


def resources(
    *,
    max_memory: str,
    workers: int,
    node_rank: int | None,
    num_nodes: int | None,
    finalize: bool,
) -> Resources:
    """What the command line asks for.

    Raises:
        ValueError: A number or a combination that cannot be.
    """
    budget = Budget(parse_size(max_memory), workers)
    return Resources(budget, share_of(node_rank, num_nodes), finalize)


def to_megatron(hf_dir: Path) -> Direction:
    """From a Hugging Face directory; no layout is asked for."""
    return ToMegatron.open(hf_dir)


def to_hf(
    place: Path | None,
    xtuner: Path | None,
    *,
    source: Literal["weights", "master"] | None = None,
    dtype: Precision | None = None,
    shard_size: str | None = None,
    template: Path | None = None,
    scales_from: Path | None = None,
) -> Direction:
    """From a Megatron checkpoint, a Hugging Face directory or XTuner's file.

    Args:
        place: A checkpoint directory.
        xtuner: A consolidated state dict, instead of `place`.
        source: What to take from a training checkpoint; None: the weights.
        dtype: None: bf16.
        shard_size: Largest file, as `parse_size` reads it; None: 5GB.
        template: Whose config.json and tokenizer are taken over; None: the checkpoint's own.
        scales_from: FP8 checkpoint whose blocks stay where they stand for the same numbers.
    """
    origin = xtuner or place
    assert origin is not None
    template = template or _own_template(origin)
    arch = Architecture.from_hf(template)
    opened = _open(origin, arch, is_xtuner=xtuner is not None, kind=source)
    return ToHF.open(
        opened,
        opened.arch if isinstance(opened, XTunerSource) else arch,
        place=origin,
        precision=dtype or "bf16",
        shard_bytes=SHARD_BYTES if shard_size is None else parse_size(shard_size),
        template=template,
        scales_from=scales_from,
    )


def _own_template(origin: Path) -> Path:
    if not origin.exists():
        raise ValueError(f"{origin}: no such file or directory; expected a checkpoint")
    if not (origin / "config.json").is_file():
        raise ValueError(
            f"{origin}: without a config.json nothing says which model it holds; give "
            f"--hf-template with the model that training started from"
        )
    return origin


def _open(
    origin: Path,
    arch: Architecture,
    *,
    is_xtuner: bool,
    kind: Literal["weights", "master"] | None,
) -> Source:
    is_megatron = (origin / INDEX).exists()
    if kind is not None and not is_megatron:
        raise ValueError(f"{origin}: --source chooses inside of a Megatron checkpoint, it is none")
    if is_xtuner:
        return XTunerSource(origin, arch)
    if any(origin.glob("*.safetensors")):
        hf = HFSource(origin, arch)
        hf.check()
        return hf
    return MegatronSource.open(origin, arch, source=kind or "weights")


def run(
    direction: Direction, out: Path, resources: Resources, console: Console, memory: PeakMeter
) -> Outcome | None:
    """Converts and says how it went; None: only the end was asked for.

    Args:
        direction: What is converted into what.
        out: The target.
        resources: Memory, processes, and this node's share.
        console: For the progress and what there is to say.
        memory: At work since before the direction was opened.

    Raises:
        ValueError: Something is wrong with source, target or machine; one message.
    """
    seal = _write_manifest if isinstance(direction, ToMegatron) else _no_seal
    if resources.finalize:
        reports = offline.finalize(direction, out, seal=seal)
        _finished(direction, out, reports, console)
        return None
    with _bar(console) as bar:
        task = bar.add_task("converting", total=None, speed="", memory="")

        def show(progress: offline.Progress) -> None:
            speed = f"{(bar.tasks[0].speed or 0) / 1e9:.2f} GB/s"
            held = f"{progress.memory_bytes / 1e9:.1f} GB memory"
            bar.update(
                task,
                completed=progress.done_bytes,
                total=progress.total_bytes,
                speed=speed,
                memory=held,
            )

        outcome = offline.convert(
            direction,
            out,
            budget=resources.budget,
            share=resources.share,
            on_progress=show,
            seal=seal,
        )
    _summarise(outcome, max(outcome.peak_memory_bytes, memory.peak_bytes), console)
    if outcome.is_finished:
        _finished(direction, out, outcome.reports, console)
    else:
        share = resources.share
        console.print(
            f"node {share.rank} of {share.num_nodes} is done; the last node completes {out}, or "
            f"--finalize does once all have ended"
        )
    return outcome


def _write_manifest(folder: Path, entries: Mapping[str, Entry]) -> None:
    """What `verify CHECKPOINT` compares files with."""
    known = {name: FileRecord(entry.size, entry.xxh3) for name, entry in entries.items()}
    known[OBJECTS] = record_file(folder / OBJECTS)
    with explained(folder):
        write_manifest(folder, known)


def _no_seal(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Hugging Face knows no manifest."""


def _finished(
    direction: Direction, out: Path, reports: Mapping[str, Report], console: Console
) -> None:
    """What there is to know of a complete target."""
    console.print(f"{out}: complete")
    if isinstance(direction, ToHF):
        _show_errors(errors_of(reports), console)
        for line in check_export(out):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _bar(console: Console) -> Progress:
    columns = ("{task.description}", "{task.fields[speed]}", "{task.fields[memory]}")
    first, *rest = (TextColumn(text) for text in columns)
    return Progress(
        first, BarColumn(), TaskProgressColumn(), *rest, TimeRemainingColumn(), console=console
    )


def _summarise(outcome: Outcome, peak_bytes: int, console: Console) -> None:
    speed = outcome.written_bytes / max(outcome.seconds, 1e-9) / 1e9
    console.print(
        f"{outcome.written_bytes:,} bytes in {outcome.seconds:.0f} s ({speed:.2f} GB/s), at most "
        f"{peak_bytes / 1e9:.2f} GB of memory"
    )


def _show_errors(report: ErrorReport, console: Console) -> None:
    """What was rounded: relative errors by kind, and the worst tensors."""
    lines = [(kind, error) for kind, error in report.kinds().items() if error.relative]
    lines += [(f"worst: {tensor.name}", tensor.error) for tensor in report.worst()[:3]]
    for what, error in lines:
        console.print(f"relative error {error.relative:.1e} {what}", highlight=False)
