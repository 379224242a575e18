"""How fast ranks reach one another: node by node, and in the groups that a layout communicates in.

Rates are those of the wire, as nccl-tests' "bus bandwidth": what a rank must send at least, by the
time it took. All groups of a kind are at work at once, as in training.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

NUM_TIMED = 3
NUM_WARM = 2
SIZES = {"cuda": 256 << 20, "cpu": 1 << 20}
"""Bytes a rank sends."""
_GB = 1e9


@dataclass(frozen=True, slots=True)
class Floors:
    """GB/s a rank below which a link is too slow."""

    across: float
    """Between nodes."""
    inside: float
    """Within a node."""


DEFAULT_FLOORS = {"cuda": Floors(across=10.0, inside=100.0), "cpu": Floors(0.001, 0.001)}
"""Each H100 has an adapter of 50 GB/s and NVLink of 450; healthy links give over half of it."""


@dataclass(frozen=True, slots=True)
class Links:
    """What was measured, the same on every rank."""

    nodes: Mapping[str, float]
    """GB/s of a node's slowest rank with the better of its partners; empty with one node."""
    groups: Mapping[str, tuple[float, tuple[str, ...]]]
    """By kind: GB/s of the slowest group, and its nodes."""
    slow: Mapping[str, str]
    """Node -> what is too slow there."""
    skew: Mapping[str, float]
    """Seconds that a node's clock is ahead of the first one's."""


def measure_links(
    device: torch.device,
    kinds: Mapping[str, tuple[str, dist.ProcessGroup]],
    nodes: Sequence[str],
    floors: Floors,
) -> Links:
    """Collective.

    Args:
        device: Of this rank.
        kinds: Name -> (`all-reduce` or `all-to-all`, this rank's group); the same names on all.
        nodes: Of each rank, by rank.
        floors: What is too slow.
    """
    names = list(dict.fromkeys(nodes))
    rounds = _between_nodes(device, nodes, names)
    own = {
        name: (_OPERATIONS[kind](device, group), dist.get_process_group_ranks(group))
        for name, (kind, group) in kinds.items()
        if group.size() > 1
    }
    everyone: list[tuple[list[float], dict[str, tuple[float, list[int]]]]] = [(rounds, own)] * len(
        nodes
    )
    dist.all_gather_object(everyone, (rounds, own))
    per_node = node_rates(nodes, [rates for rates, _ in everyone])
    groups, slow = slowest_groups(nodes, [rates for _, rates in everyone], floors)
    slow |= {
        node: f"{rate:.2f} GB/s to other nodes, expected {floors.across:g} and more"
        for node, rate in per_node.items()
        if rate < floors.across
    }
    return Links(per_node, groups, slow, clock_skew(nodes))


def node_rates(nodes: Sequence[str], rounds: Sequence[Sequence[float]]) -> dict[str, float]:
    """Of each node its slowest rank's rate, in the round in which that was best.

    A slow node slows its partners too, which are others in the next round: only its own rate stays
    low in every round.
    """
    rates: dict[str, list[list[float]]] = {}
    for node, own in zip(nodes, rounds, strict=True):
        rates.setdefault(node, []).append(list(own))
    return {
        node: max(min(of_round) for of_round in zip(*ranks, strict=True))
        for node, ranks in rates.items()
        if ranks[0]
    }


def slowest_groups(
    nodes: Sequence[str],
    rates: Sequence[Mapping[str, tuple[float, Sequence[int]]]],
    floors: Floors,
) -> tuple[dict[str, tuple[float, tuple[str, ...]]], dict[str, str]]:
    """The slowest group of each kind, and what is too slow by node.

    A group is as slow as its slowest rank. Where it is within one node, that node is the culprit;
    of a wider one all are named that are in no group of the kind which is fast enough.
    """
    slowest: dict[str, tuple[float, tuple[str, ...]]] = {}
    slow: dict[str, str] = {}
    for kind in dict.fromkeys(kind for own in rates for kind in own):
        groups: dict[tuple[int, ...], float] = {}
        for own in rates:
            if kind in own:
                rate, ranks = own[kind]
                groups[tuple(ranks)] = min(rate, groups.get(tuple(ranks), rate))
        places = {ranks: tuple(dict.fromkeys(nodes[r] for r in ranks)) for ranks in groups}
        worst = min(groups, key=groups.__getitem__)
        slowest[kind] = groups[worst], places[worst]
        floor = {
            ranks: floors.across if len(places[ranks]) > 1 else floors.inside for ranks in groups
        }
        fast = {
            node for ranks, rate in groups.items() if rate >= floor[ranks] for node in places[ranks]
        }
        for ranks, rate in groups.items():
            if rate >= floor[ranks]:
                continue
            blamed = [node for node in places[ranks] if node not in fast] or places[ranks]
            for node in blamed:
                slow[node] = f"{kind}: {rate:.2f} GB/s, expected {floor[ranks]:g} and more"
    return slowest, slow


def clock_skew(nodes: Sequence[str]) -> dict[str, float]:
    """Collective. Seconds by which each node's clock is ahead of the first node's.

    Read right after a barrier, which ranks leave within milliseconds; the median of several.
    """
    readings = []
    for _ in range(5):
        dist.barrier()
        times = [0.0] * len(nodes)
        dist.all_gather_object(times, time.time())
        readings.append(times)
    skew: dict[str, float] = {}
    for rank, node in enumerate(nodes):
        skew.setdefault(node, median(times[rank] - times[0] for times in readings))
    return skew


def _between_nodes(device: torch.device, nodes: Sequence[str], names: Sequence[str]) -> list[float]:
    """Rates of this rank with its namesakes one and two nodes further on and back."""
    rank = dist.get_rank()
    local = [r for r in range(len(nodes)) if nodes[r] == nodes[rank]].index(rank)
    ranks_of = {name: [r for r, node in enumerate(nodes) if node == name] for name in names}
    place = names.index(nodes[rank])
    sent = torch.ones(SIZES[device.type] // 4, device=device)
    received = torch.empty_like(sent)
    rates = []
    for distance in (1, 2):
        if len(names) <= distance:
            continue
        after = ranks_of[names[(place + distance) % len(names)]][local]
        before = ranks_of[names[(place - distance) % len(names)]][local]

        def exchange(after: int = after, before: int = before) -> None:
            operations = [
                dist.P2POp(dist.isend, sent, after),
                dist.P2POp(dist.irecv, received, before),
            ]
            for work in dist.batch_isend_irecv(operations):
                work.wait()

        rates.append(sent.nbytes / _seconds(exchange, device) / _GB)
    return rates


def _all_reduce(device: torch.device, group: dist.ProcessGroup) -> float:
    buffer = torch.zeros(SIZES[device.type] // 4, device=device)
    seconds = _seconds(lambda: dist.all_reduce(buffer, group=group), device)
    return 2 * (group.size() - 1) / group.size() * buffer.nbytes / seconds / _GB


def _all_to_all(device: torch.device, group: dist.ProcessGroup) -> float:
    num = SIZES[device.type] // 4 // group.size() * group.size()
    sent = torch.zeros(num, device=device)
    received = torch.empty_like(sent)
    seconds = _seconds(lambda: dist.all_to_all_single(received, sent, group=group), device)
    return (group.size() - 1) / group.size() * sent.nbytes / seconds / _GB


_OPERATIONS: Mapping[str, Callable[[torch.device, dist.ProcessGroup], float]] = {
    "all-reduce": _all_reduce,
    "all-to-all": _all_to_all,
}


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, the mean of several after some to warm up."""
    for _ in range(NUM_WARM):
        work()
    _synchronize(device)
    dist.barrier()
    began = time.perf_counter()
    for _ in range(NUM_TIMED):
        work()
    _synchronize(device)
    return (time.perf_counter() - began) / NUM_TIMED


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
