"""From a job to what trains it: model, optimizer, step; and from the model to a directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_dsv3.checkpoint.store import Trainee
from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.job import Job
from megatron_dsv3.convert.bridge import Bridge, in_fp8
from megatron_dsv3.convert.hf_io import HFReader, write_hf
from megatron_dsv3.model.build import build_chunks, freeze_mtp, wrap
from megatron_dsv3.model.config import mcore_config
from megatron_dsv3.model.groups import Groups
from megatron_dsv3.train.optimizer import build_optimizer, build_schedule
from megatron_dsv3.train.step import TrainStep

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HF_DTYPES = {"bf16": "bfloat16", "fp8": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True, slots=True)
class Engine:
    """What trains the model of a bridge."""

    bridge: Bridge
    optimizer: Any
    schedule: OptimizerParamScheduler
    step: TrainStep

    @property
    def trainee(self) -> Trainee:
        """What a checkpoint holds."""
        return Trainee(self.bridge.chunks, self.optimizer, self.schedule, self.bridge.groups)


def build_model(
    job: Job, arch: Architecture, groups: Groups, *, checkpoint: Architecture
) -> Bridge:
    """The model without weights: they come from Hugging Face's files or a checkpoint.

    Args:
        job: The job.
        arch: Of the model that is trained.
        groups: This rank's place.
        checkpoint: Of Hugging Face's files, which may hold MTP layers that are not trained.
    """
    config = mcore_config(
        arch,
        job.parallel,
        dtype=DTYPES[job.precision.compute],
        device=groups.device,
        experts=job.experts,
        memory=job.memory,
        precision=job.precision,
        kernels=job.kernels,
    )
    chunks = build_chunks(
        arch,
        job.parallel,
        groups,
        config,
        max_seq_length=job.data.seq_length,
        transformer_engine=groups.device.type == "cuda",
    )
    return Bridge(chunks, arch, job.parallel, groups, checkpoint)


def build_engine(job: Job, bridge: Bridge, *, num_steps: int) -> Engine:
    """Optimizer, schedule and step around a model; fp32 masters are copied from its weights."""
    if job.mtp.mode == "freeze":
        freeze_mtp(bridge.chunks)
    config = bridge.chunks[0].config
    wrapped = wrap(
        bridge.chunks,
        config,
        optimizer=job.optimizer,
        num_optimizer_instances=job.parallel.num_optimizer_instances,
    )
    optimizer = build_optimizer(job.optimizer, wrapped, dtype=config.params_dtype)
    schedule = build_schedule(
        job.schedule,
        optimizer,
        max_lr=job.optimizer.lr,
        weight_decay=job.optimizer.weight_decay,
        num_steps=num_steps,
    )
    step = TrainStep(
        wrapped,
        optimizer,
        bridge.groups,
        mtp_loss_weight=job.mtp.loss_weight,
        experts=job.experts,
        spikes=job.spikes,
    )
    return Engine(bridge, optimizer, schedule, step)


def write_model(bridge: Bridge, job: Job, reader: HFReader, directory: Path) -> None:
    """Collective: every rank takes part in the export; rank 0 writes."""
    dtype, arch = job.output.dtype, bridge.checkpoint or bridge.arch
    live = job.precision.compute if dtype == "fp8" else dtype
    stream = bridge.export(dtype=DTYPES[live], untouched=reader)
    if bridge.groups.rank != 0:
        for _ in stream:
            pass
        return
    write_hf(
        in_fp8(stream, arch) if dtype == "fp8" else stream,
        directory,
        shard_bytes=int(job.output.shard_size_gb * 1e9),
        config=arch.to_hf(dtype=HF_DTYPES[dtype], fp8=dtype == "fp8"),
        template=job.model.hf_dir,
    )
