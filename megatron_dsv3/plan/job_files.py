"""A recommended layout as files: the job, what lives where, and a script for slurm."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_dsv3.config.job import Job
from megatron_dsv3.config.section import problem_lines
from megatron_dsv3.config.yaml_file import dump_yaml
from megatron_dsv3.plan.costs import saves_meanwhile
from megatron_dsv3.plan.records import GIB, Plan

JOB, PLACEMENT, SCRIPT = "job.yaml", "placement.txt", "train.sh"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a job needs besides its layout."""

    hf_dir: Path
    data: Path
    """A store of `megatron-dsv3 prepare`, or chat files."""
    is_store: bool
    out: Path
    """Of the Hugging Face directory at the end."""
    launcher: Path
    """examples/train_dsv3_671b.sh of this version."""
    num_epochs: int = 1


def job_of(plan: Plan, inputs: Inputs) -> Job:
    """The training that a plan is of.

    Raises:
        ValueError: Settings that exclude each other.
    """
    work = plan.workload
    rows = work.micro_batch_size * work.num_micro_batches * work.parallel.dp_size(work.world_size)
    data: dict[str, Any] = {"seq_length": work.seq_length}
    data |= {"store": str(inputs.data)} if inputs.is_store else {"paths": [str(inputs.data)]}
    content = {
        "model": {"hf_dir": str(inputs.hf_dir)},
        "data": data,
        "parallel": work.parallel.model_dump(),
        "optimizer": work.optimizer.model_dump(),
        "precision": work.precision.model_dump(),
        "memory": work.memory.model_dump(),
        "train": {
            "global_batch_size": rows,
            "micro_batch_size": work.micro_batch_size,
            "num_epochs": inputs.num_epochs,
        },
        "output": {"dir": str(inputs.out)},
        # Beside offloaded states a node may have no room for the copy of a save.
        "checkpoint": {"asynchronous": saves_meanwhile(plan)},
    }
    try:
        job = Job.model_validate(content)
    except ValidationError as error:
        raise ValueError(
            "\n".join(f"{name}: {text}" for name, text in problem_lines(error, Job))
        ) from None
    if problems := job.problems(work.arch, work.world_size):
        raise ValueError("\n".join(problems))
    return job


def write_files(plan: Plan, inputs: Inputs, directory: Path) -> list[Path]:
    """Writes job, placement and script into a directory that holds nothing yet.

    Raises:
        ValueError: The directory is not empty, or the job cannot work.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} is not an empty directory; name another one with --write")
    job = job_of(plan, inputs)
    texts = {
        JOB: _job_text(job, plan),
        PLACEMENT: placement_text(plan),
        SCRIPT: _script(plan, inputs),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    return [directory / name for name in texts]


def placement_text(plan: Plan) -> str:
    """Stages with their chunks and memory."""
    card = plan.cluster.card
    lines = [
        f"{plan.workload.world_size} x {card.name}, {plan.workload.seq_length} tokens a row",
        "E embedding, t layer, m MTP, L head and loss; chunks of a stage parted by |; GiB a card",
        f"{'stage':>5}  {'states':>6}  {'activations':>11}  {'total':>6}  chunks",
    ]
    for stage in plan.stages:
        states, activations = stage.states.gpu / GIB, stage.activations.total / GIB
        lines.append(
            f"{stage.pp_rank:>5}  {states:>6.1f}  {activations:>11.1f}  {stage.total / GIB:>6.1f}"
            f"  {stage.letters}"
        )
    lines.append(f"spare on the fullest card: {plan.spare_gib:.1f} of {card.memory_gib:.1f} GiB")
    return "\n".join(lines) + "\n"


def _job_text(job: Job, plan: Plan) -> str:
    """Without what is default: a reader sees what the plan decided."""
    cluster, step = plan.cluster, plan.step
    card, fullest = cluster.card, plan.fullest.total / GIB
    nodes = plan.workload.world_size // cluster.gpus_per_node
    head = [
        f"# {nodes} nodes of {cluster.gpus_per_node} x {card.name}, by `megatron-dsv3 plan "
        "search`.",
        f"# Projected: {step.total:.1f} s a step, {step.tokens_per_second_per_gpu:,.0f} tokens/s a "
        f"GPU, MFU {step.mfu:.1%},",
        f"# {fullest:.1f} of {card.memory_gib:.1f} GiB on the fullest card.",
    ]
    content: Mapping[str, Any] = job.model_dump(mode="json", exclude_defaults=True)
    return "\n".join(head) + "\n" + dump_yaml(content)


def _script(plan: Plan, inputs: Inputs) -> str:
    """Hands the job to the launcher of examples/, which knows slurm, containers and signals."""
    gpus = plan.cluster.gpus_per_node
    nodes = plan.workload.world_size // gpus
    return f"""#!/usr/bin/env bash
# Trains what `megatron-dsv3 plan search` planned for {nodes} nodes: submits itself to slurm, checks
# the nodes, saves before the time limit, is requeued and goes on. Without slurm it takes this one.
#   bash {SCRIPT} [option ...] [section.name=value ...]
# Options are those of {inputs.launcher.name} (--help), such as --time, --spares, --image; --dry-run
# prints what would be submitted. Checkpoints and logs are below runs/, beside this file.
set -euo pipefail

here=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
exec bash {shlex.quote(str(inputs.launcher))} \\
    --nodes {nodes} --gpus-per-node {gpus} --name {_plain(inputs.out.name)} --job "$here/{JOB}" \\
    --runs "$here/runs" {shlex.quote(f"output.dir={inputs.out}")} "$@"
"""


def _plain(name: str) -> str:
    """A name for slurm: what is no letter, digit, dot, dash or underscore is a dash."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name) or "job"
