"""`--explain` of the `plan` commands: where every number of a plan is from."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from megatron_dsv3.plan.layer_times import UnitTime
from megatron_dsv3.plan.memory import COMMUNICATOR, CONTEXT, UNUSABLE
from megatron_dsv3.plan.records import GIB, Plan
from megatron_dsv3.plan.speed import Speed

UNITS = {
    "dense": "a dense layer",
    "moe": "an expert layer",
    "mtp": "an MTP layer",
    "head": "one pass of head and loss",
}


def explain(plan: Plan, speed: Speed, console: Console, *, counted: bool) -> None:
    """Prints the origin of bytes, of the kernels and messages of each kind of layer, and of links.

    Args:
        plan: What was shown.
        speed: What its times were worked out with.
        console: For everything.
        counted: Whether memory was counted on whole stages; else it is sums of counted layers.
    """
    for name, origin in memory_origins(plan, counted=counted).items():
        _tell(console, f"{name}: {origin}")
    for name, origin in plan.step.origins.items():
        _tell(console, f"{name}: {origin}")
    for unit, times in speed.units(plan.workload).items():
        console.print(_table(UNITS[unit], times))
    for name, source in plan.cluster.card.sources.items():
        _tell(console, f"{name}: {source}")


def memory_origins(plan: Plan, *, counted: bool) -> Mapping[str, str]:
    """By column of the tables of memory, and of what follows from parameters."""
    how = "the stage itself" if counted else "each kind of layer, summed"
    passes = (
        f"one micro-batch through {how}, on the meta device; what Transformer Engine holds by "
        f"plan/saved_tensors.yaml, measured on an H100; experts at {plan.workload.imbalance:g} "
        "times the mean"
    )
    built = f"read off {how}, built on the meta device as a rank of the whole world"
    return {
        "weights, gradients": built,
        "optimizer": f"{built}; bytes a number as Megatron-Core keeps them",
        "caches": "FP8 copies and empty gradients by the weights' shapes, cuBLAS's workspaces "
        "measured on an H100",
        "saved, experts, MTP, logits, again, working": passes,
        "in flight": "the schedule, pass by pass, in Megatron-Core's order",
        "or update": "what Transformer Engine and Megatron-Core make for a moment, measured on an "
        "H100",
        "buffers": f"assumed: {CONTEXT / GIB:.1f} GiB for CUDA, {COMMUNICATOR / GIB:.2f} for each "
        "communicator",
        "unusable": f"assumed: {UNUSABLE:.0%} that the allocator's blocks leave unused",
        "on the host": "states as above; activations twice: pinned memory comes in powers of two",
        "checkpoint, disk": "14 bytes a parameter; two kept, one being written, and the model",
        "days": "steps of the samples' tokens, times the projected step",
    }


def _table(title: str, times: UnitTime) -> Table:
    table = Table("", "ms", "backward", "from", title=title, title_justify="left", box=None)
    for row in times.rows:
        seconds = row.seconds
        if seconds.forward or seconds.backward:
            both = (f"{seconds.forward * 1e3:.3f}", f"{seconds.backward * 1e3:.3f}")
            table.add_row(row.name, *both, seconds.origin)
    return table


def _tell(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
