"""`megatron-dsv3 preflight`: are these nodes fit for this job?

In three steps on many nodes, so that one that cannot even start is named instead of waited for:
each node writes a report, one of them chooses, the chosen ones measure their links. In one step
where all processes run already.
"""

import os
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_dsv3.commands.train import device_for
from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.durable import write_durably
from megatron_dsv3.config.job import Job
from megatron_dsv3.launch.links import DEFAULT_FLOORS, Floors, Links, measure_links
from megatron_dsv3.launch.local import local_facts
from megatron_dsv3.launch.needs import bytes_in, decimal, needs_of
from megatron_dsv3.launch.node_report import NodeReport, read_report, report_node, write_report
from megatron_dsv3.launch.verdict import Wanted, choose, judge
from megatron_dsv3.model import cpu
from megatron_dsv3.model import groups as model_groups

CHOSEN = "nodes"
"""File beside the reports: the nodes to train on, parted by commas."""
CONSIDERED = "considered"
"""The same of all that it was chosen among, for the table."""
SLOW = ".slow"
"""Ending of a file with what was wrong with a node's links."""
MOST_SKEW_S = 1.0
_PATIENCE_S = 30.0
_TIMEOUT = timedelta(minutes=5)
_GIB = 1 << 30
_LOG_WIDTH = 140


def run_local(console: Console) -> None:
    """Shows this machine; what may be in the way stands beside it."""
    table = Table()
    for heading in ("", "found", "note"):
        table.add_column(heading, overflow="fold")
    for fact in local_facts():
        table.add_row(fact.what, fact.value, fact.warning or "")
    console.print(table)


def floors(job: Job, *, across: float | None, inside: float | None) -> Floors:
    """What was asked for, else the device's own."""
    default = DEFAULT_FLOORS[device_for(job).type]
    return Floors(
        default.across if across is None else across, default.inside if inside is None else inside
    )


def report(job: Job, directory: Path, node: str) -> None:
    """Step 1, on every node."""
    write_report(report_node(node, job), directory)


def choose_nodes(
    job: Job, directory: Path, nodes: Sequence[str], console: Console, *, needed: int
) -> None:
    """Step 2, on one node: writes the file of the chosen ones.

    Raises:
        ValueError: Too few are fit. All is shown first.
    """
    # All have been written before this step: what is late is the shared file system.
    reports = _read(directory, nodes, patience_s=_PATIENCE_S)
    wanted = _wanted(job, needed)
    problems = judge(reports, wanted)
    for node in nodes:
        problems[node] += _slow_before(directory, node)
    try:
        chosen = choose(problems, needed=needed)
    except ValueError:
        _show(console, reports, problems, wanted, None)
        raise
    write_durably(directory / CONSIDERED, ",".join(nodes) + "\n")
    write_durably(directory / CHOSEN, ",".join(chosen) + "\n")


def links(
    job: Job, directory: Path, nodes: Sequence[str], console: Console, floors: Floors
) -> None:
    """Step 3, under torchrun on the chosen nodes, which are given in the order of their ranks.

    Raises:
        ValueError: A link is too slow or a clock wrong. What is so is left beside the reports, so
            that another choice can be made.
    """
    _join(job)
    try:
        # One reads for all: a file system may show a file to some nodes earlier than to others.
        reports, before = model_groups.from_rank_0(lambda: _considered(directory, nodes))
        node = nodes[int(os.environ.get("GROUP_RANK", "0"))]
        slow = _finish(job, node, reports, before, console, floors)
        if dist.get_rank() == 0:
            for name, found in slow.items():
                write_durably(directory / f"{name}{SLOW}", "; ".join(found) + "\n")
        _end(slow)
    finally:
        model_groups.stop()


def at_once(job: Job, console: Console, floors: Floors) -> None:
    """All steps, of the processes that run: this one, or torchrun's.

    Raises:
        ValueError: On every rank, what is in the way.
    """
    _join(job)
    try:
        node = f"{socket.gethostname()}#{os.environ.get('GROUP_RANK', '0')}"
        own = report_node(node, job) if os.environ.get("LOCAL_RANK", "0") == "0" else None
        found: list[NodeReport | None] = [own] * dist.get_world_size()
        dist.all_gather_object(found, own)
        reports = {one.node: one for one in found if one is not None}
        _end(_finish(job, node, reports, {}, console, floors))
    finally:
        model_groups.stop()


def _join(job: Job) -> None:
    device = device_for(job)
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)
    # Shorter than NCCL's own patience: a link that does not work ends the check, not the night.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


def _finish(
    job: Job,
    node: str,
    reports: Mapping[str, NodeReport | None],
    before: Mapping[str, Sequence[str]],
    console: Console,
    floors: Floors,
) -> dict[str, list[str]]:
    """Collective. Judges, measures, shows; problems of the nodes that take part.

    Args:
        job: The job.
        node: Where this rank is.
        reports: Of these nodes, and of others that were not chosen.
        before: Problems that were found earlier.
        console: Of rank 0.
        floors: Of the links.
    """
    world_size = dist.get_world_size()
    nodes: list[str] = [node] * world_size
    dist.all_gather_object(nodes, node)
    taken = list(dict.fromkeys(nodes))
    arch = Architecture.from_hf(job.model.hf_dir)
    if found := job.problems(arch, world_size):
        raise model_groups.SharedError("\n".join(found))
    wanted = model_groups.from_rank_0(lambda: _wanted(job, len(taken)))
    problems = judge(reports, wanted)
    for name, earlier in before.items():
        problems[name] += earlier
    measured = None
    if not any(problems[name] for name in taken):
        measured = _measure(job, nodes, floors)
        for name, text in {**measured.slow, **_skewed(measured)}.items():
            problems[name].append(text)
    if dist.get_rank() == 0:
        _show(console, reports, problems, wanted, measured)
    return {name: problems[name] for name in taken if problems[name]}


def _end(problems: Mapping[str, Sequence[str]]) -> None:
    """Collective. Raises on every rank what is in the way; the table has been shown."""
    dist.barrier()
    if problems:
        told = "; ".join(f"{node}: {'; '.join(found)}" for node, found in problems.items())
        raise model_groups.SharedError(f"pre-flight: {told}; nothing was started")


def _measure(job: Job, nodes: Sequence[str], floors: Floors) -> Links:
    device = device_for(job)
    if device.type == "cpu":
        cpu.enable()
    places = model_groups.start(job.parallel, device, seed=job.train.seed).collection
    kinds = {
        "all-reduce of gradients (dp * cp)": ("all-reduce", places.dp_cp),
        "all-reduce of experts' gradients (edp)": ("all-reduce", places.expt_dp),
        "all-reduce in layers (tp)": ("all-reduce", places.tp),
        "all-reduce among stages (pp)": ("all-reduce", places.pp),
        "all-to-all of sequences (cp)": ("all-to-all", places.cp),
        "all-to-all of tokens (ep)": ("all-to-all", places.ep),
    }
    return measure_links(device, kinds, nodes, floors)


def _skewed(measured: Links) -> dict[str, str]:
    return {
        node: f"its clock is {seconds:+.1f} s from the first node's; is its time service running?"
        for node, seconds in measured.skew.items()
        if abs(seconds) > MOST_SKEW_S
    }


def _read(
    directory: Path, nodes: Sequence[str], *, patience_s: float
) -> dict[str, NodeReport | None]:
    end = time.monotonic() + patience_s
    return {node: read_report(directory, node, patience_s=end - time.monotonic()) for node in nodes}


def _considered(
    directory: Path, taken: Sequence[str]
) -> tuple[dict[str, NodeReport | None], dict[str, list[str]]]:
    """Reports of all that were chosen among, and earlier problems of those that were not taken."""
    names = (directory / CONSIDERED).read_text().strip().split(",")
    reports = _read(directory, names, patience_s=0)
    return reports, {name: _slow_before(directory, name) for name in names if name not in taken}


def _slow_before(directory: Path, node: str) -> list[str]:
    path = directory / f"{node}{SLOW}"
    return [path.read_text().strip()] if path.exists() else []


def _wanted(job: Job, num_nodes: int) -> Wanted:
    arch = Architecture.from_hf(job.model.hf_dir)
    present = {
        "checkpoints": bytes_in(job.checkpoint_dir),
        "output": bytes_in(job.output.dir),
    }
    return Wanted(needs_of(job, arch), present, num_nodes)


def _show(
    console: Console,
    reports: Mapping[str, NodeReport | None],
    problems: Mapping[str, Sequence[str]],
    wanted: Wanted,
    measured: Links | None,
) -> None:
    table = Table(title="Pre-flight")
    headings = ("node", "GPUs", "memory", "/dev/shm", "disk", "clock", "link", "verdict")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for node, one in reports.items():
        verdict = "; ".join(problems[node]) or "fit"
        if one is None:
            table.add_row(node, *[""] * 6, verdict)
            continue
        used = measured is not None and node in measured.skew
        rate = measured.nodes.get(node) if measured is not None else None
        table.add_row(
            node,
            str(len(one.devices)),
            f"{one.memory_free / _GIB:,.0f} of {one.memory_total / _GIB:,.0f} GiB",
            f"{one.shm_free / _GIB:,.1f} GiB",
            decimal(one.disks["checkpoints"].free),
            f"{measured.skew[node]:+.3f} s" if measured is not None and used else "",
            "" if rate is None else f"{rate:.2f} GB/s",
            verdict,
        )
    # A log has no width that the verdicts would have to fit into.
    wide = console if console.is_terminal else Console(file=console.file, width=_LOG_WIDTH)
    wide.print(table)
    for line in _lines(reports, wanted, measured):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _lines(
    reports: Mapping[str, NodeReport | None], wanted: Wanted, measured: Links | None
) -> list[str]:
    """What is no node's own."""
    needs = wanted.needs
    lines = [
        f"a checkpoint takes {decimal(needs.checkpoint)}, all that are kept "
        f"{decimal(needs.checkpoints)}, the output {decimal(needs.output)}; "
        f"memory of each host {needs.host / wanted.num_nodes / _GIB:,.1f} GiB"
    ]
    there = [one for one in reports.values() if one is not None]
    if there:
        names = ("python", "torch", "megatron-core", "transformer-engine")
        lines.append(", ".join(f"{name} {there[0].versions[name]}" for name in names))
        lines.append(f"model {there[0].model[:12]}, data {there[0].data[:12]}")
    if measured is not None:
        for kind, (rate, places) in measured.groups.items():
            lines.append(f"{kind}: slowest {rate:.2f} GB/s ({', '.join(places)})")
    return lines
