"""The parity gate: before the first step, the model in its layout against transformers' layers."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from itertools import batched, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_dsv3.config.job import Job
from megatron_dsv3.convert.bridge import Bridge
from megatron_dsv3.convert.hf_layers import HFLayers
from megatron_dsv3.convert.live_capture import NO_DOCUMENT, Capture, Gathered
from megatron_dsv3.convert.parity_gate import TOLERANCES, Document, Report, compare
from megatron_dsv3.data.batch import Batch, make_batch
from megatron_dsv3.data.store import Sample
from megatron_dsv3.model.groups import SharedError
from megatron_dsv3.train.spikes import NonFiniteError
from megatron_dsv3.train.step import Losses, TrainStep, to_row

DOCUMENTS_PER_ROW = 2
"""Packed into each micro-batch, so that a document that sees its neighbour is noticed."""
MAX_TOKENS = 256
"""Of a document; a longer one is cut."""
TOTAL_TOKENS = 16384
"""Of all documents of a large layout together: rank 0 computes the reference of each."""
MIN_TOKENS = 32
PATIENCE = timedelta(days=1)
"""How long the other ranks wait for rank 0."""


def check_parity(
    step: TrainStep,
    bridge: Bridge,
    samples: Iterable[Sample],
    *,
    job: Job,
    hf_dir: Path,
    console: Console,
) -> Report:
    """Collective: runs the model on a few samples and compares each part with the reference.

    Args:
        step: Of the loaded model, nothing trained.
        bridge: To the same model.
        samples: Of which the first are taken, cut, and every token counted.
        job: The layout.
        hf_dir: The reference.
        console: Of rank 0, which prints the table.

    Raises:
        SharedError: On every rank, where a part is beyond the tolerance of the number format.
    """
    num_mtp = bridge.arch.num_mtp_layers
    chosen = _choose(samples, job, dp_size=bridge.groups.dp_size, num_mtp=num_mtp)
    mine = _of_rank(chosen, job, bridge)
    capture = Capture(bridge)
    with capture.running(), _out_of_fp8(step.config):
        try:
            losses = step.evaluate([batch for batch, _ in mine])
        except NonFiniteError:  # all ranks raise it; the comparison says in which layer it began
            losses = Losses(math.nan, math.nan if num_mtp else None)
    # Through the trainer's own slicing, which thereby says where each token is.
    tags = [
        to_row(replace(batch, tokens=numbers), bridge.groups).tokens[0].cpu()
        for batch, numbers in mine
    ]
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        live = capture.gather(tags, group)
        report = _verdict(live, losses, chosen, bridge, hf_dir, group)
    finally:
        dist.destroy_process_group(group)
    if isinstance(report, str):
        raise SharedError(report)
    if bridge.groups.rank == 0:
        console.print(report_table(report))
    if report.problem:
        raise SharedError(report.problem)
    return report


def _verdict(
    live: Gathered | None,
    losses: Losses,
    samples: Sequence[Sample],
    bridge: Bridge,
    hf_dir: Path,
    group: dist.ProcessGroup,
) -> Report | str:
    """What rank 0 finds, on every rank; a text where it could not compare."""
    found: list[Any] = [None]
    if live is not None:
        dtype = bridge.chunks[0].config.params_dtype
        documents = [Document(s.id, torch.from_numpy(s.tokens).long()) for s in samples]
        try:
            with _all_cores():
                found[0] = compare(
                    HFLayers(hf_dir),
                    live,
                    documents,
                    losses=(losses.main, losses.mtp),
                    num_mtp=bridge.arch.num_mtp_layers,
                    tolerance=TOLERANCES[dtype],
                )
        except (ValueError, OSError) as error:
            found[0] = f"the parity gate could not compare: {error}"
    dist.broadcast_object_list(found, src=0, group=group)
    report: Report | str = found[0]
    return report


@contextmanager
def _out_of_fp8(config: Any) -> Iterator[None]:
    """Runs the products as `compute` says: what FP8 rounds off would hide what is wrong."""
    kept, config.fp8 = config.fp8, None
    try:
        yield
    finally:
        config.fp8 = kept


@contextmanager
def _all_cores() -> Iterator[None]:
    """torchrun gives each process one thread; here the others of the node wait for this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _num_micro_batches(job: Job) -> int:
    """Enough to bring the pipeline to exchange more than one."""
    parallel = job.parallel
    return parallel.pp_size if parallel.vpp_size > 1 else min(2, parallel.pp_size)


def _choose(samples: Iterable[Sample], job: Job, *, dp_size: int, num_mtp: int) -> list[Sample]:
    """The documents of all data-parallel ranks; every rank has its own, as its experts may too."""
    number = dp_size * _num_micro_batches(job) * DOCUMENTS_PER_ROW
    longest = min(MAX_TOKENS, max(MIN_TOKENS, TOTAL_TOKENS // number))
    shortest = 2 + num_mtp
    long_enough = (s for s in cycle(samples) if len(s.tokens) >= shortest)
    if not any(len(s.tokens) >= shortest for s in samples):
        raise ValueError(f"no sample of at least {shortest} tokens for the parity gate")
    return [
        Sample(s.id, s.tokens[:longest], np.ones(len(s.tokens[:longest]), np.bool_))
        for s in islice(long_enough, number)
    ]


def _of_rank(chosen: Sequence[Sample], job: Job, bridge: Bridge) -> list[tuple[Batch, Tensor]]:
    """This rank's micro-batches, and for each the numbers of its tokens, [b, s]."""
    groups, multiple = bridge.groups, job.row_multiple
    longest = max(len(sample.tokens) for sample in chosen)
    length = -(-longest // multiple) * multiple
    result, number = [], 0
    for index, samples in enumerate(batched(chosen, DOCUMENTS_PER_ROW)):
        numbers = torch.full((len(samples), length), NO_DOCUMENT)
        for row, sample in enumerate(samples):
            size = len(sample.tokens)
            numbers[row, :size] = torch.arange(number, number + size)
            number += size
        if index % groups.dp_size == groups.dp_rank:
            batch = make_batch(
                samples, seq_length=length, num_mtp=bridge.arch.num_mtp_layers, pad_id=0
            )
            result.append((batch, numbers))
    return result


def report_table(report: Report) -> Table:
    """One line a part."""
    table = Table(
        *("part", "files", "tokens", "ties", "error", "of allowed"),
        title=f"Parity with transformers on {report.directory}",
        caption=f"run from the tokens on, the logits differ by {report.logits_error:.1e} of their "
        "norm; ties: tokens to which rounding gave other experts",
    )
    for part in report.differences:
        table.add_row(
            *(part.part, part.files, str(part.compared), str(part.ties), f"{part.error:.1e}"),
            f"{part.share:.1%}" if part.ok else f"[red]{part.share:.1%}",
        )
    return table
