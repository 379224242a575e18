"""The training loop."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer_param_scheduler import (
    OptimizerParamScheduler,
    get_canonical_lr_for_logging,
)

from megatron_dsv3.data.batch import Batch
from megatron_dsv3.data.dataset import Position
from megatron_dsv3.model.groups import Groups, SharedError
from megatron_dsv3.train.collector import few_collections
from megatron_dsv3.train.metrics import Sink, StepRecord
from megatron_dsv3.train.spikes import NonFiniteError
from megatron_dsv3.train.step import Counts, Losses, StepResult, TrainStep

START = Position()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """This data-parallel rank's micro-batches of one optimizer step."""

    micro_batches: Sequence[Batch]
    epoch: float
    """Epochs done once this batch is."""
    after: Position = START
    """Where the data goes on once this batch is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All that the loop needs."""

    step: TrainStep
    schedule: OptimizerParamScheduler
    optimizer: Any
    groups: Groups
    num_steps: int
    flops: Callable[[Counts], float]
    """Model FLOPs of a step, forward and backward."""
    max_lr: float
    peak_tflops: float | None = None
    """Of one device, for MFU."""
    validate: Callable[[], Losses] | None = None
    validate_every_steps: int = 100
    expert_load_every_steps: int = 50
    sinks: Sequence[Sink] = ()
    """On rank 0."""
    first_step: int = 1
    """Number of the first batch's step; above 1 where an earlier run is continued."""
    on_step: Sequence[Callable[[StepRecord, StepBatch], None]] = ()
    """Called on every rank after each step, with its batch: saving."""


@few_collections()
def train(run: Run, batches: Iterable[StepBatch]) -> list[StepRecord]:
    """Trains to the end of `batches` and returns every step's record.

    Raises:
        NonFiniteError: From the step, which was not applied.
    """
    records = []
    try:
        for number, batch in enumerate(batches, start=run.first_step):
            began = time.perf_counter()
            lr = get_canonical_lr_for_logging(run.optimizer.param_groups) or 0.0
            try:
                result = run.step(batch.micro_batches, lr_fraction=lr / run.max_lr)
            except ValueError as error:
                # Other kinds of ValueError have constructors of their own.
                kind = type(error) if isinstance(error, SharedError) else ValueError
                raise kind(f"step {number}: {error}") from error
            run.schedule.step(1)
            # A step ends with a read of the loss, so this is finished work; only the update goes on
            # meanwhile where that is a GPU, and counts for the next step.
            seconds = time.perf_counter() - began
            record = _record(run, number, batch, result, lr, seconds)
            records.append(record)
            for sink in run.sinks:
                sink.log(record)
            _log_expert_load(run, number)
            for callback in run.on_step:
                callback(record, batch)
        run.step.settle()
    finally:
        for sink in run.sinks:
            sink.close()
    return records


def _record(
    run: Run, number: int, batch: StepBatch, result: StepResult, lr: float, seconds: float
) -> StepRecord:
    tflops = run.flops(result.counts) / seconds / run.groups.world_size / 1e12
    return StepRecord(
        step=number,
        num_steps=run.num_steps,
        epoch=batch.epoch,
        loss=result.losses.main,
        mtp_loss=result.losses.mtp,
        lr=lr,
        grad_norm=result.grad_norm,
        seconds=seconds,
        tokens=result.counts.tokens,
        counted_tokens=int(result.counts.counted[0]),
        num_devices=run.groups.world_size,
        tflops_per_device=tflops,
        mfu=None if run.peak_tflops is None else tflops / run.peak_tflops,
        peak_memory_gib=_peak_memory_gib(run.groups.device),
        expert_balance=result.expert_balance,
        validation_loss=_validation_loss(run, number),
        skipped=result.skipped,
        num_skipped=run.step.guard.num_skipped,
    )


def _is_due(number: int, every_steps: int, num_steps: int) -> bool:
    return number % every_steps == 0 or number == num_steps


def _validation_loss(run: Run, number: int) -> float | None:
    """Collective, like all that follows a step; its time does not count as the step's.

    Raises:
        NonFiniteError: It is not finite, and the job says stop.
    """
    if run.validate is None or not _is_due(number, run.validate_every_steps, run.num_steps):
        return None
    try:
        return run.validate().main
    except NonFiniteError as error:
        if run.step.guard.section.action == "skip":
            return math.nan
        raise NonFiniteError(f"validation after step {number}: {error}") from error


def _log_expert_load(run: Run, number: int) -> None:
    if _is_due(number, run.expert_load_every_steps, run.num_steps):
        loads = run.step.experts.loads()
        for sink in run.sinks:
            sink.log_expert_load(number, loads)


def _peak_memory_gib(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / 2**30
