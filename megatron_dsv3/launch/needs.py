"""What a job will take of disks and host memory, from its settings and the model's sizes."""

import math
from dataclasses import dataclass
from pathlib import Path

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.counts import (
    CHECKPOINT_STATE_BYTES,
    OFFLOADED_STATE_BYTES,
    count_parameters,
    host_bytes_of_a_save,
)
from megatron_dsv3.config.job import Job
from megatron_dsv3.convert.hf_plan import plan_shards
from megatron_dsv3.data.manifest import read_manifest

_BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes."""

    checkpoint: int
    """One full checkpoint."""
    checkpoints: int
    """All that the job keeps at a time, and the one being written."""
    output: int
    """The Hugging Face directories."""
    host: int
    """Memory of all hosts together: the optimizer, where it lives there, and a copy of what is
    being saved."""


def needs_of(job: Job, arch: Architecture) -> Needs:
    """Of a whole training.

    Where the number of steps is not known before the data are prepared, checkpoints of weights
    alone (`keep_weights_every`) and exports on the way are counted once.
    """
    counts = count_parameters(arch)
    mtp = 0 if job.mtp.mode == "off" else counts.mtp
    trained = counts.total + mtp
    section, weight = job.checkpoint, _BYTES[job.precision.compute]
    full = trained * (weight + CHECKPOINT_STATE_BYTES)
    steps = _num_steps(job)
    kept = 0
    if section.every_steps is not None:
        kept = full * (section.keep_last + 1)
        if section.keep_weights_every is not None:
            between = math.lcm(section.every_steps, section.keep_weights_every)
            kept += trained * weight * _times(steps, between)
    exported = sum(shard.nbytes for shard in plan_shards(arch, precision=job.output.dtype))
    exports = 1 + _times(steps, section.export_hf_every_steps)
    offloaded = job.optimizer.offload_fraction
    host = trained * OFFLOADED_STATE_BYTES * offloaded
    if section.every_steps is not None:
        host += trained * host_bytes_of_a_save(
            arch,
            weight_bytes=weight,
            offload_fraction=offloaded,
            asynchronous=section.asynchronous,
        )
    return Needs(full, kept, exported * exports, int(host))


def decimal(size: int) -> str:
    """Bytes as disks are sold: `9.557 TB`."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:,.4g} {units[0]}"


def existing_part(path: Path) -> Path:
    """The path, or the nearest folder above it that is there: its disk will hold it."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def bytes_in(folder: Path) -> int:
    """Of all files below a folder, which need not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _num_steps(job: Job) -> int | None:
    train, steps = job.train, None
    if job.data.store is not None and (manifest := read_manifest(job.data.store)) is not None:
        rows = math.ceil(manifest.num_tokens / job.data.seq_length)
        steps = math.ceil(rows * train.num_epochs / train.global_batch_size)
    return min(steps or train.num_steps or 0, train.num_steps or steps or 0) or None


def _times(steps: int | None, between: int | None) -> int:
    if between is None:
        return 0
    return 1 if steps is None else steps // between
