"""What a training as a whole needs: days, disk, host memory."""

from dataclasses import dataclass

from megatron_dsv3.config.counts import (
    CHECKPOINT_STATE_BYTES,
    count_parameters,
    host_bytes_of_a_save,
)
from megatron_dsv3.plan.records import GIB, Plan

WEIGHT_BYTES = 2
HOST_SHARE = 0.9
"""Of a node's memory; the rest is the system's and the processes' own."""
KEPT_CHECKPOINTS = 2
"""As `checkpoint.keep_last` has it; a third is there while it is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Of one training."""

    num_steps: int
    days: float
    checkpoint_tb: float
    """One, with masters and moments, in 10^12 bytes."""
    disk_tb: float
    """Checkpoints that are kept, the one under way, and the exported directory."""
    host_gib: float
    """A node: states that live there, and the copy of a save, asynchronous where it has room."""


def costs(plan: Plan, *, num_samples: int, num_epochs: int = 1) -> Costs:
    """What it takes to train on that many samples of the plan's document length."""
    work, step = plan.workload, plan.step
    length = min(work.document_length or work.seq_length, work.seq_length)
    tokens = num_samples * num_epochs * length
    rows = work.micro_batch_size * work.num_micro_batches * work.parallel.dp_size(work.world_size)
    num_steps = max(1, round(tokens / (rows * work.seq_length)))
    numbers = _numbers(plan)
    checkpoint = numbers * (WEIGHT_BYTES + CHECKPOINT_STATE_BYTES)
    return Costs(
        num_steps=num_steps,
        days=num_steps * step.total / 86400,
        checkpoint_tb=checkpoint / 1e12,
        disk_tb=((KEPT_CHECKPOINTS + 1) * checkpoint + numbers * WEIGHT_BYTES) / 1e12,
        host_gib=plan.host_gib + _copy_gib(plan, asynchronous=saves_meanwhile(plan)),
    )


def saves_meanwhile(plan: Plan) -> bool:
    """Whether a node's memory holds the copy that an asynchronous save takes."""
    needed = plan.host_gib + _copy_gib(plan, asynchronous=True)
    return needed <= HOST_SHARE * plan.cluster.host_memory_gib


def _copy_gib(plan: Plan, *, asynchronous: bool) -> float:
    work = plan.workload
    each = host_bytes_of_a_save(
        work.arch,
        offload_fraction=work.optimizer.offload_fraction,
        asynchronous=asynchronous,
    )
    return _numbers(plan) * each / (work.world_size / plan.cluster.gpus_per_node) / GIB


def _numbers(plan: Plan) -> int:
    counts = count_parameters(plan.workload.arch)
    return counts.total + counts.mtp
