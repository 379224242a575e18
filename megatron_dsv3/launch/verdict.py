"""Which nodes are fit for a job, from what each says of itself and what the others say."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_dsv3.launch.local import LEAST_SHM_GIB
from megatron_dsv3.launch.needs import Needs, decimal
from megatron_dsv3.launch.node_report import NodeReport

LEAST_FREE = 0.9
"""Share of a GPU's memory below which something else uses it."""
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a job asks of nodes."""

    needs: Needs
    present: Mapping[str, int]
    """Bytes of `checkpoints` and `output` that the job's folders hold already."""
    num_nodes: int


def judge(reports: Mapping[str, NodeReport | None], wanted: Wanted) -> dict[str, list[str]]:
    """Every node's problems; none: it is fit.

    Of what must be equal the value of most nodes is right; of as many, that of the first.
    """
    found: dict[str, list[str]] = {
        node: ["reported nothing; see what it wrote to the log"] if report is None else []
        for node, report in reports.items()
    }
    there = [report for report in reports.values() if report is not None]
    for report in there:
        found[report.node] += [*report.problems, *_short(report, wanted)]
    for what, value in _equal(there).items():
        values = [value(report) for report in there]
        right = Counter(values).most_common(1)[0][0]
        for report, own in zip(there, values, strict=True):
            # What could not be read is a problem of the node already.
            if own != right and own and right:
                found[report.node].append(f"{what} {own}, but {right} on other nodes")
    return found


def choose(problems: Mapping[str, Sequence[str]], *, needed: int) -> list[str]:
    """The first fit nodes.

    Raises:
        ValueError: They are too few; names those that are not fit.
    """
    fit = [node for node, found in problems.items() if not found]
    if len(fit) >= needed:
        return fit[:needed]
    bad = {node: "; ".join(found) for node, found in problems.items() if found}
    # A problem of all nodes is told once.
    lines: dict[str, list[str]] = {}
    for node, text in bad.items():
        lines.setdefault(text, []).append(node)
    told = "\n".join(f"  {', '.join(nodes)}: {text}" for text, nodes in lines.items())
    raise ValueError(
        f"{len(fit)} of {len(problems)} nodes are fit, {needed} are needed; nothing was started:\n"
        f"{told}"
    )


def _equal(reports: Sequence[NodeReport]) -> dict[str, Callable[[NodeReport], str]]:
    packages = dict.fromkeys(name for report in reports for name in report.versions)
    same: dict[str, Callable[[NodeReport], str]] = {
        name: lambda report, name=name: report.versions.get(name, "not installed")  # type: ignore[misc]
        for name in packages
    }
    same["GPUs:"] = lambda report: _devices(report)
    same["model's hash is"] = lambda report: report.model
    same["data's hash is"] = lambda report: report.data
    return same


def _devices(report: NodeReport) -> str:
    counts = Counter(device.name for device in report.devices)
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "none"


def _short(report: NodeReport, wanted: Wanted) -> list[str]:
    """What this node has too little of."""
    problems = [
        f"GPU {index}: {device.free / _GIB:.1f} of {device.total / _GIB:.1f} GiB free; "
        "something else uses it, see nvidia-smi"
        for index, device in enumerate(report.devices)
        if device.free < LEAST_FREE * device.total
    ]
    if report.shm_free < LEAST_SHM_GIB * _GIB:
        problems.append(
            f"/dev/shm: {report.shm_free / _GIB:.2f} GiB free, NCCL wants {LEAST_SHM_GIB:g} and "
            "more; start a container with --ipc=host"
        )
    host = wanted.needs.host / wanted.num_nodes
    if report.memory_free < host:
        problems.append(
            f"memory: {report.memory_free / _GIB:,.0f} GiB free, but the job takes "
            f"{host / _GIB:,.0f} a node (optimizer.offload_fraction; checkpoint.asynchronous)"
        )
    return problems + _disk_problems(report, wanted)


def _disk_problems(report: NodeReport, wanted: Wanted) -> list[str]:
    needs = {"checkpoints": wanted.needs.checkpoints, "output": wanted.needs.output}
    by_device: dict[int, list[str]] = {}
    for what, disk in report.disks.items():
        by_device.setdefault(disk.device, []).append(what)
    problems = []
    for kinds in by_device.values():
        free = report.disks[kinds[0]].free
        needed = sum(max(needs[what] - wanted.present.get(what, 0), 0) for what in kinds)
        if free < needed:
            folders = ", ".join(report.disks[what].folder for what in kinds)
            problems.append(
                f"{folders}: {decimal(free)} free, but {' and '.join(kinds)} will take "
                f"{decimal(needed)} more; lower checkpoint.keep_last, or name another folder"
            )
    return problems
