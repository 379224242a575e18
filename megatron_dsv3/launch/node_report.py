"""What one node says of itself before a training: written to a file that all nodes see."""

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import torch
from pydantic import ValidationError

from megatron_dsv3.config.durable import write_durably
from megatron_dsv3.config.job import Job
from megatron_dsv3.config.section import Section, problem_lines
from megatron_dsv3.data.manifest import MANIFEST, STORE_FILES
from megatron_dsv3.data.sources import find_inputs
from megatron_dsv3.launch.local import versions
from megatron_dsv3.launch.needs import existing_part
from megatron_dsv3.launch.samples import model_files, sampled_hash

UNREADABLE = ""


class Device(Section):
    """A GPU."""

    name: str
    free: int
    """Bytes."""
    total: int


class Disk(Section):
    """Where a folder of the job is, or will be."""

    folder: str
    free: int
    """Bytes."""
    device: int
    """Number of its file system on this node."""
    writable: bool


class NodeReport(Section):
    """One node."""

    node: str
    versions: dict[str, str]
    devices: list[Device]
    memory_free: int
    """Bytes, as all sizes here."""
    memory_total: int
    shm_free: int
    disks: dict[str, Disk]
    """Of `checkpoints` and `output`."""
    model: str
    """Hash; empty: could not be read."""
    data: str
    problems: list[str]
    """What this node could tell by itself."""


def report_node(node: str, job: Job) -> NodeReport:
    """Looks at this machine; what cannot be read is a problem of the report, not an error."""
    problems: list[str] = []
    memory = psutil.virtual_memory()
    return NodeReport(
        node=node,
        versions={"python": platform.python_version(), **versions()},
        devices=_devices() if job.train.device != "cpu" else [],
        memory_free=memory.available,
        memory_total=memory.total,
        shm_free=shutil.disk_usage("/dev/shm").free,
        disks={
            "checkpoints": _disk(job.checkpoint_dir, problems),
            "output": _disk(job.output.dir.parent, problems),
        },
        model=_hash("model", lambda: model_files(job.model.hf_dir), problems),
        data=_hash("data", lambda: _data_files(job), problems),
        problems=problems,
    )


def write_report(report: NodeReport, directory: Path) -> None:
    """`<node>.json`, whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    write_durably(directory / f"{report.node}.json", report.model_dump_json(indent=1) + "\n")


def read_report(directory: Path, node: str, *, patience_s: float = 0.0) -> NodeReport | None:
    """A node's report; None: it has written none.

    Args:
        directory: Given to `write_report`.
        node: Its name.
        patience_s: How long to wait; a shared file system shows new files late.

    Raises:
        ValueError: The file is no report.
    """
    path, end = directory / f"{node}.json", time.monotonic() + patience_s
    while not path.exists():
        if time.monotonic() >= end:
            return None
        time.sleep(0.2)
    try:
        return NodeReport.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problems = "; ".join(f"{name}: {text}" for name, text in problem_lines(error, NodeReport))
        raise ValueError(f"{path}: not a node's report: {problems}") from None


def _devices() -> list[Device]:
    if not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        devices.append(Device(name=name, free=free, total=total))
    return devices


def _disk(folder: Path, problems: list[str]) -> Disk:
    place = existing_part(folder)
    writable = os.access(place, os.W_OK)
    if not writable:
        problems.append(f"{place}: this user cannot write there")
    free, device = shutil.disk_usage(place).free, place.stat().st_dev
    return Disk(folder=str(folder), free=free, device=device, writable=writable)


def _hash(what: str, files: Callable[[], Iterable[Path]], problems: list[str]) -> str:
    try:
        return sampled_hash(files())
    except (OSError, ValueError) as error:
        problems.append(f"{what} cannot be read: {error}")
        return UNREADABLE


def _data_files(job: Job) -> list[Path]:
    files: list[Path] = []
    for section in (job.data, job.validation):
        if section.store is not None:
            files += [section.store / name for name in (MANIFEST, *STORE_FILES)]
        elif section.paths:
            files += find_inputs(section.paths).files
    return files
