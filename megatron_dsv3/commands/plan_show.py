"""`megatron-dsv3 plan show` and `plan compare`: what a job takes, counted on the model itself."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from megatron_dsv3.commands.plan_explain import explain
from megatron_dsv3.commands.plan_search import layout_text, tell
from megatron_dsv3.config.architecture import DEEPSEEK_V3, Architecture
from megatron_dsv3.config.job import Job
from megatron_dsv3.plan.costs import HOST_SHARE, costs
from megatron_dsv3.plan.kernels import load_kernels
from megatron_dsv3.plan.memory import count_memory
from megatron_dsv3.plan.records import GIB, Cluster, Plan, StageMemory, StepTime, Workload
from megatron_dsv3.plan.speed import Speed
from megatron_dsv3.train.optimizer import build_optimizer

PUBLISHED = "deepseek-v3"
STATES: Mapping[str, str] = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "caches": "caches",
    "optimizer_host": "on the host",
}
ACTIVATIONS: Mapping[str, str] = {
    "saved": "saved",
    "experts": "experts",
    "mtp": "MTP",
    "logits": "logits",
    "recomputed": "again",
    "working": "working",
    "update": "or update",
    "host": "on the host",
}
"""Fields of the records and what the tables call them."""
OVERLAP_HINT_SHARE = 0.2
"""Of a step: from there on it is worth saying that all-to-alls can be overlapped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A job where it would run."""

    job: Job
    world_size: int
    cluster: Cluster
    model: str | None = None
    """Hugging Face directory in place of the job's, or `deepseek-v3`."""
    document_length: int | None = None
    imbalance: float = 1.2
    kernels: Path | None = None
    """Table of kernel times of the card."""
    num_samples: int = 100_000


def show(
    question: Question, console: Console, *, origins: bool = False, json_file: Path | None = None
) -> Plan:
    """Prints the plan of a job.

    Args:
        question: The job, and where.
        console: For everything.
        origins: Say where every number is from.
        json_file: Where to write the figures to as well.

    Raises:
        ValueError: The job cannot run so; with every reason.
    """
    plan = plan_of(question, console)
    if json_file is not None:
        json_file.write_text(json.dumps(figures(plan), indent=1) + "\n", encoding="utf-8")
    tell(console, _headline(plan))
    for table in (*memory_tables(plan), _step_table(plan.step)):
        console.print(table)
    for line in _notes(question, plan):
        tell(console, line)
    if origins:
        kernels = load_kernels(question.cluster.card, question.kernels)
        explain(plan, Speed(question.cluster, kernels), console, counted=True)
    return plan


def figures(plan: Plan) -> dict[str, Any]:
    """Of a plan, for other programs: GiB by stage, seconds of a step."""
    step = plan.step
    return {
        "stages": [
            {
                "pp_rank": stage.pp_rank,
                "allocated_gib": stage.allocated / GIB,
                "total_gib": stage.total / GIB,
                "states_gib": stage.states.gpu / GIB,
            }
            for stage in plan.stages
        ],
        "step_seconds": step.total,
        "tokens_per_second_per_gpu": step.tokens_per_second_per_gpu,
        "spare_gib": plan.spare_gib,
    }


def compare(questions: Sequence[Question], console: Console, *, names: Sequence[str]) -> None:
    """Prints plans side by side, and the settings in which their jobs differ."""
    table = Table("", *names)
    rows = [_figures(question, plan_of(question, console)) for question in questions]
    for label in rows[0]:
        table.add_row(label, *(row[label] for row in rows))
    settings = [_flat(question.job.model_dump(mode="json")) for question in questions]
    for name in settings[0]:
        values = [str(one[name]) for one in settings]
        if len(set(values)) > 1:
            table.add_row(name, *values)
    console.print(table)


def plan_of(question: Question, console: Console) -> Plan:
    """Counts memory and works out times."""
    arch = _architecture(question)
    workload = Workload.of_job(
        question.job,
        arch,
        question.world_size,
        imbalance=question.imbalance,
        document_length=question.document_length,
    )
    kernels = load_kernels(question.cluster.card, question.kernels)
    step = Speed(question.cluster, kernels).step(workload)
    columns = (TextColumn("stages"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("stages", total=workload.parallel.pp_size)
        stages = count_memory(
            workload,
            build_optimizer,
            on_stage=lambda pp_rank: progress.update(task, completed=pp_rank + 1),
        )
    return Plan(workload=workload, cluster=question.cluster, stages=stages, step=step)


def _architecture(question: Question) -> Architecture:
    if question.model == PUBLISHED:
        return DEEPSEEK_V3
    if question.model is not None:
        return Architecture.from_hf(Path(question.model))
    hf_dir = question.job.model.hf_dir
    if (hf_dir / "config.json").is_file():
        return Architecture.from_hf(hf_dir)
    raise ValueError(
        f"model.hf_dir {hf_dir}: no config.json there; give --model HF_DIR, or --model {PUBLISHED} "
        "for the published 671B"
    )


def memory_tables(plan: Plan) -> list[Table]:
    """GiB of the fullest rank of every stage, by what they are for."""
    states, activations = Table("stage", title="States, GiB a GPU"), Table("stage")
    activations.title = (
        f"Activations and all, GiB a GPU, of {plan.cluster.card.memory_gib:.1f}; the busiest "
        f"experts have {plan.workload.imbalance:g} times the mean"
    )
    parts = [asdict(stage.states) | asdict(stage.activations) for stage in plan.stages]
    kept = _columns(states, STATES, parts)
    states.add_column("chunks", overflow="fold")
    moving = _columns(activations, ACTIVATIONS, parts)
    for name in ("in flight", "buffers", "unusable", "total", "left"):
        activations.add_column(name, justify="right")
    for stage, part in zip(plan.stages, parts, strict=True):
        rank = str(stage.pp_rank)
        cells = [f"{part[name] / GIB:.2f}" for name in kept]
        states.add_row(rank, *cells, _short(stage.letters))
        cells = [f"{part[name] / GIB:.2f}" for name in moving]
        activations.add_row(rank, *cells, *_totals(stage, plan.cluster.card.memory_gib))
    return [states, activations]


def _columns(
    table: Table, names: Mapping[str, str], parts: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Adds a column for each part that any stage has."""
    there = [name for name in names if any(part[name] >= 0.005 * GIB for part in parts)]
    for name in there:
        table.add_column(names[name], justify="right")
    return there


def _totals(stage: StageMemory, memory_gib: float) -> list[str]:
    left = memory_gib - stage.total / GIB
    spare = f"{left:.1f}" if left >= 0 else f"[red]{left:.1f}[/]"
    in_flight = f"{stage.activations.in_flight:.3g}"
    other = (f"{size / GIB:.1f}" for size in (stage.buffers, stage.fragmentation))
    return [in_flight, *other, f"{stage.total / GIB:.1f}", spare]


def _short(letters: str) -> str:
    return re.sub(r"t{3,}", lambda run: f"t*{len(run[0])}", letters)


def _step_table(step: StepTime) -> Table:
    table = Table("a step", title="Seconds")
    parts = ("compute", "tp", "ep", "cp", "dp", "bubble", "optimizer")
    for name in (*parts, "total"):
        table.add_column(name, justify="right")
    seconds = [getattr(step, name) for name in parts]
    table.add_row("s", *(f"{value:.2f}" for value in (*seconds, step.total)))
    table.add_row("share", *(f"{value / step.total:.0%}" for value in seconds), "")
    return table


def _headline(plan: Plan) -> str:
    workload, cluster = plan.workload, plan.cluster
    return (
        f"{workload.world_size} x {cluster.card.name}, {layout_text(workload) or 'one GPU'}: "
        f"{workload.num_micro_batches} micro-batches of {workload.micro_batch_size} x "
        f"{workload.seq_length:,} tokens on {workload.parallel.dp_size(workload.world_size)} "
        "data-parallel ranks"
    )


def _notes(question: Question, plan: Plan) -> list[str]:
    step, cluster = plan.step, plan.cluster
    total = costs(plan, num_samples=question.num_samples, num_epochs=question.job.train.num_epochs)
    lines = [
        f"{step.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, {step.tflops:.0f} TFLOP/s, MFU "
        f"{step.mfu:.1%}",
        f"{question.num_samples:,} samples x {question.job.train.num_epochs}: "
        f"{total.num_steps:,} steps, {total.days:.2f} days; a checkpoint "
        f"{total.checkpoint_tb:.2f} TB, disk {total.disk_tb:.2f} TB; host memory "
        f"{total.host_gib:,.0f} GiB a node of {cluster.host_memory_gib:,.0f}",
    ]
    fullest = plan.fullest
    if plan.spare_gib < 0:
        lines.append(
            f"does not fit: stage {fullest.pp_rank} lacks {-plan.spare_gib:.1f} GiB; try a wider "
            "memory.recompute, optimizer.moments=bf16, optimizer.offload_fraction, or `megatron-"
            "dsv3 plan search`"
        )
    lacks = plan.host_gib - HOST_SHARE * cluster.host_memory_gib
    if lacks > 0:
        lines.append(
            f"does not fit: a node lacks {lacks:,.0f} GiB of host memory for offloaded states and "
            "activations; lower optimizer.offload_fraction, or `megatron-dsv3 plan search`"
        )
    if step.ep > OVERLAP_HINT_SHARE * step.total:
        lines.append(_about_all_to_alls(question.job, plan))
    if not cluster.card.measured:
        lines.append(f"nothing was measured on {cluster.card.name}: times are projected")
    return lines


def _about_all_to_alls(job: Job, plan: Plan) -> str:
    share = f"all-to-alls take {plan.step.ep / plan.step.total:.0%} of the step"
    if job.experts.overlap_all_to_all:
        return f"{share}, as if nothing hid them: what their overlap gains was not measured"
    needs = list(job.overlap_needs)
    if plan.workload.num_micro_batches == 1:
        needs.append("another micro-batch to compute meanwhile")
    listed = f" (needs {', '.join(needs)})" if needs else ""
    return f"{share}; experts.overlap_all_to_all may hide them{listed}"


def _figures(question: Question, plan: Plan) -> dict[str, str]:
    step, fullest = plan.step, plan.fullest
    total = costs(plan, num_samples=question.num_samples, num_epochs=question.job.train.num_epochs)
    return {
        "layout": layout_text(plan.workload) or "one GPU",
        "fullest stage": f"{fullest.pp_rank}",
        "GiB a GPU": f"{fullest.total / GIB:.1f} of {plan.cluster.card.memory_gib:.1f}",
        "  states": f"{fullest.states.gpu / GIB:.1f}",
        "  activations": f"{fullest.activations.total / GIB:.1f}",
        "s a step": f"{step.total:.2f}",
        "  bubble": f"{step.bubble / step.total:.0%}",
        "tokens/s/GPU": f"{step.tokens_per_second_per_gpu:,.0f}",
        "MFU": f"{step.mfu:.1%}",
        "days": f"{total.days:.2f}",
        "host GiB a node": f"{total.host_gib:,.0f}",
    }


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
