"""What this machine brings to a job: versions, devices, memory, disks. It asks no other node."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

PACKAGES = (
    *("torch", "megatron-core", "transformer-engine", "apex", "deep_ep", "transformers"),
    *("safetensors", "numpy", "megatron_dsv3"),
)
LEAST_SHM_GIB = 1.0
"""NCCL takes tens of MiB a process and data loaders more; Docker's default is 64 MiB in all."""
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Fact:
    """One line about this machine."""

    what: str
    value: str
    warning: str | None = None
    """What to do about it; None: nothing speaks against it."""


def local_facts(directories: tuple[Path, ...] = ()) -> list[Fact]:
    """Everything, in a fixed order.

    Args:
        directories: Where a job will read or write; the current one is always among them.
    """
    facts = [Fact("python", platform.python_version())]
    facts += [Fact(package, version) for package, version in versions().items()]
    facts += _devices()
    facts += [_memory(), _shm()]
    facts += [_disk(directory) for directory in (Path.cwd(), *directories)]
    return facts


def versions() -> dict[str, str]:
    """Of the packages that a training depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _devices() -> Iterator[Fact]:
    if not torch.cuda.is_available():
        yield Fact(
            "GPUs", "none", "only CPUs will be used; in a container, start it with --gpus all"
        )
        return
    yield Fact("GPUs", str(torch.cuda.device_count()))
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        text = f"{name}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
        # A job of someone else, or one that was killed and still holds its memory.
        warning = "something else uses it; see nvidia-smi" if free < 0.9 * total else None
        yield Fact(f"GPU {index}", text, warning)


def _memory() -> Fact:
    memory = psutil.virtual_memory()
    free, total = memory.available / _GIB, memory.total / _GIB
    return Fact("memory", f"{free:.1f} of {total:.1f} GiB free")


def _shm() -> Fact:
    usage = shutil.disk_usage("/dev/shm")
    text = f"{usage.free / _GIB:.2f} of {usage.total / _GIB:.2f} GiB free"
    small = usage.free < LEAST_SHM_GIB * _GIB
    way_out = f"NCCL wants {LEAST_SHM_GIB:g} GiB and more; start a container with --ipc=host"
    return Fact("/dev/shm", text, way_out if small else None)


def _disk(directory: Path) -> Fact:
    usage = shutil.disk_usage(directory)
    text = f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free"
    writable = os.access(directory, os.W_OK)
    return Fact(str(directory), text, None if writable else "this user cannot write there")
