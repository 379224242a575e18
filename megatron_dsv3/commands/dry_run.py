"""`megatron-dsv3 train --dry-run`: all that training checks, and its model built as shapes."""

import torch
from rich.console import Console

from megatron_dsv3.commands.train import read_inputs, stage_table
from megatron_dsv3.config.job import Job
from megatron_dsv3.convert.hf_io import check_target
from megatron_dsv3.plan.build import built
from megatron_dsv3.plan.records import Workload


def run(job: Job, console: Console, *, num_processes: int) -> None:
    """Starts no processes, needs no GPU and writes nothing.

    Files, tokenizer, data and layout are checked as training does; then the first rank of every
    pipeline stage is built on the meta device with Megatron-Core's own configuration.

    Args:
        job: What would be trained.
        console: For what was found.
        num_processes: Of the training.

    Raises:
        ValueError: The job cannot train on that many processes; with every reason.
    """
    check_target(job.output.dir)
    # The machine that checks is seldom the one that trains: `auto` means GPUs here.
    kind = "cpu" if job.train.device == "cpu" else "cuda"
    inputs = read_inputs(job, num_processes, torch.device(kind))
    workload = Workload.of_job(job, inputs.checkpoint, num_processes)
    parameters = []
    for pp_rank in range(job.parallel.pp_size):
        with built(workload, pp_rank) as rank:
            parameters.append(sum(p.numel() for chunk in rank.chunks for p in chunk.parameters()))
    console.print(stage_table(inputs))
    fullest = max(range(len(parameters)), key=parameters.__getitem__)
    console.print(
        f"{num_processes} processes of {kind}, {workload.num_micro_batches} micro-batches each a "
        f"step, at most {parameters[fullest]:,} parameters on a process (stage {fullest}): this "
        "job can train",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
