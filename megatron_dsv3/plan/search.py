"""The layouts that fit, best first, why others lose, and what is missing where none fits."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_dsv3.plan.estimate import (
    estimate,
    stage_activations,
    stage_states,
)
from megatron_dsv3.plan.kernels import Kernels
from megatron_dsv3.plan.layouts import Layout, Precision, Request, layouts
from megatron_dsv3.plan.memory import UNUSABLE, buffers
from megatron_dsv3.plan.records import GIB, Cluster, Plan, StageMemory, Workload
from megatron_dsv3.plan.speed import Speed

MemoryModel = Callable[[Workload], Sequence[StageMemory]]
Progress = Callable[[int, int], None]
"""Told how many layouts are done, of how many."""
HOST_RESERVE = 0.25
"""Share of a node's memory for the system, the data, and copies of checkpoints under way."""
MOST_COUNTED = 6
"""Recommendations that are counted before the search gives up on finding one that holds."""
MOST_NODES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A layout that fits."""

    plan: Plan
    recompute: str
    """Name of its set in `layouts.RECOMPUTE`."""
    states: str
    """Name of its rung of `layouts.STATES`."""
    precision: Precision
    counted: bool
    """Whether its memory was counted on the model; else it is the closed form's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Missed:
    """A layout that would be faster, if it fitted."""

    workload: Workload
    recompute: str
    lacks_gib: float
    faster: float
    """Over the best that fits; 0.1: by a tenth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a search ends with."""

    found: tuple[Found, ...]
    """Best first."""
    missed: Missed | None
    """Of the faster ones that do not fit, the one that lacks least."""
    num_layouts: int
    num_fitting: int


@dataclass(frozen=True, slots=True)
class _Rung:
    """The first of the allowed ways to keep states with which a layout fits."""

    name: str | None
    """None: with none."""
    lacks_gib: float
    """Of the best rung where none fits."""


def search(
    request: Request,
    kernels: Kernels,
    *,
    top: int = 10,
    exact: MemoryModel | None = None,
    on_progress: Progress = lambda done, total: None,
) -> Result:
    """Goes through all layouts.

    Args:
        request: What is asked.
        kernels: Of the request's card.
        top: How many to give back.
        exact: Counts the memory of what is recommended; None: the closed form is trusted.
        on_progress: For a progress bar.

    Raises:
        ValueError: Nothing fits; with what is missing and the nearest that works.
    """
    everything = list(layouts(request))
    fitting: list[tuple[Layout, str]] = []
    missing: list[tuple[float, Layout]] = []
    for number, layout in enumerate(everything):
        on_progress(number, len(everything))
        rung = _first_rung(layout, request)
        if rung.name is None:
            missing.append((rung.lacks_gib, layout))
        else:
            fitting.append((layout, rung.name))
    speed = Speed(request.cluster, kernels)
    found = _best(fitting, request, speed, top)
    if exact is not None:
        found = _counted(found, exact)
    if not found:
        raise ValueError(what_is_missing(request, missing))
    on_progress(len(everything), len(everything))
    return Result(
        found=tuple(found),
        missed=_nearest_miss(missing, request, found[0], speed),
        num_layouts=len(everything),
        num_fitting=len(fitting),
    )


def fits(request: Request) -> bool:
    """Whether any layout does, by the closed form."""
    return any(_first_rung(layout, request).name is not None for layout in layouts(request))


def fewest_nodes(request: Request, *, above: int = 0) -> int | None:
    """Smallest number of nodes that works, by the closed form; None: none up to `MOST_NODES`.

    Counts that a world is seldom cut into (more than 16 nodes and no multiple of 4) are left out.
    """
    counts = (n for n in range(above + 1, MOST_NODES + 1) if n <= 16 or n % 4 == 0)
    return next((n for n in counts if fits(replace(request, nodes=n))), None)


def what_is_missing(request: Request, missing: Sequence[tuple[float, Layout]]) -> str:
    """One sentence: how much is missing, with which setting it would fit, or on how many nodes."""
    nodes, length = request.nodes, _length(request.seq_length)
    lacks = _nearest(missing, request)
    if lacks < float("inf"):
        start = f"{nodes} nodes lack {lacks:.1f} GiB a card at {length}"
    elif missing:
        start = f"{nodes} nodes lack host memory for what the cards cannot hold at {length}"
    else:
        start = (
            f"{nodes} nodes of {request.cluster.gpus_per_node} GPUs cannot be cut into any layout "
            f"with a global batch of {request.global_batch_size} rows of {length}"
        )
    ways = [f"with {name} it fits" for name, wider in _relaxed(request) if fits(wider)]
    more = fewest_nodes(replace(request, global_batch_size=None), above=nodes)
    ways += [f"or {more} nodes" if ways else f"{more} nodes do it"] if more else []
    return "; ".join([start, *(ways or ["no setting and no number of nodes up to 512 helps"])])


def _relaxed(request: Request) -> list[tuple[str, Request]]:
    """Each kind of saving that the request leaves out, taken in."""
    kinds = {
        "bf16 moments": ("states", ("bf16 moments",)),
        "optimizer offload": ("states", ("half offloaded", "offloaded")),
        "optimizer offload and bf16 gradients": ("states", ("offloaded, bf16 gradients",)),
        "full recompute": ("recompute", ("full",)),
    }
    wider = []
    for name, (field, additions) in kinds.items():
        allowed: tuple[str, ...] = getattr(request, field)
        if not set(additions) <= set(allowed):
            changed = {field: (*allowed, *additions)}
            wider.append((name, replace(request, **changed)))  # type: ignore[arg-type]
    if request.global_batch_size is not None:
        wider.append(("another global batch", replace(request, global_batch_size=None)))
    return wider


def _length(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else f"{tokens} tokens"


def _first_rung(layout: Layout, request: Request) -> _Rung:
    """Where none fits, `lacks_gib` may be too low: activations are looked at only if states fit."""
    activations: list[int] = []
    lacks = float("inf")
    for name in request.states:
        states = stage_states(layout.with_states(name))
        if _host_lacks(max(s.optimizer_host for s in states), request.cluster) > 0:
            continue
        short = _lacks([s.gpu for s in states], layout.workload, request.cluster)
        if short <= 0:
            activations = activations or [a.total for a in stage_activations(layout.workload)]
            pairs = zip(states, activations, strict=True)
            allocated = [s.gpu + a for s, a in pairs]
            short = _lacks(allocated, layout.workload, request.cluster)
        if short <= 0:
            return _Rung(name, 0.0)
        lacks = min(lacks, short)
    return _Rung(None, lacks)


def _lacks_exactly(layout: Layout, request: Request) -> float:
    """GiB a card, with the rung that comes nearest; infinite where host memory rules all out."""
    activations = [a.total for a in stage_activations(layout.workload)]
    lacks = float("inf")
    for name in request.states:
        states = stage_states(layout.with_states(name))
        if _host_lacks(max(s.optimizer_host for s in states), request.cluster) <= 0:
            pairs = zip(states, activations, strict=True)
            allocated = [s.gpu + a for s, a in pairs]
            lacks = min(lacks, _lacks(allocated, layout.workload, request.cluster))
    return lacks


def _nearest(missing: Sequence[tuple[float, Layout]], request: Request) -> float:
    """The least that any layout lacks, in GiB a card."""
    least = float("inf")
    for at_least, layout in sorted(missing, key=lambda pair: pair[0]):
        if at_least >= least:
            break
        least = min(least, _lacks_exactly(layout, request))
    return least


def _lacks(allocated: Sequence[int], workload: Workload, cluster: Cluster) -> float:
    """GiB that the fullest card lacks; negative: has left."""
    total = max(allocated) * (1 + UNUSABLE) + buffers(workload)
    return total / GIB - cluster.card.memory_gib


def _host_lacks(offloaded: int, cluster: Cluster) -> float:
    needed = offloaded * cluster.gpus_per_node / GIB
    return needed - (1 - HOST_RESERVE) * cluster.host_memory_gib


def _best(
    fitting: Sequence[tuple[Layout, str]], request: Request, speed: Speed, top: int
) -> list[Found]:
    """Simulated best first by what they can reach at most, until none can be among the best."""
    ranked = [
        (-speed.rate_at_most(layout.with_states(rung)), number)
        for number, (layout, rung) in enumerate(fitting)
    ]
    heapq.heapify(ranked)
    found: list[Found] = []
    worst = 0.0
    while ranked:
        at_most, number = heapq.heappop(ranked)
        if len(found) >= top and -at_most <= worst:
            break
        layout, rung = fitting[number]
        workload = layout.with_states(rung)
        plan = Plan(
            workload=workload, cluster=request.cluster, stages=estimate(workload),
            step=speed.step(workload),
        )  # fmt: skip
        found.append(
            Found(
                plan=plan, recompute=layout.recompute, states=rung, precision=layout.precision,
                counted=False,
            )
        )  # fmt: skip
        found.sort(key=lambda one: -one.plan.step.tokens_per_second_per_gpu)
        del found[top:]
        worst = found[-1].plan.step.tokens_per_second_per_gpu
    return found


def _counted(found: Sequence[Found], exact: MemoryModel) -> list[Found]:
    """From the first on whose counted memory fits, too; the others after it as they are."""
    for index, one in enumerate(found[:MOST_COUNTED]):
        plan = replace(one.plan, stages=tuple(exact(one.plan.workload)))
        if plan.spare_gib >= 0:
            return [replace(one, plan=plan, counted=True), *found[index + 1 :]]
    return []


def _nearest_miss(
    missing: Sequence[tuple[float, Layout]], request: Request, best: Found, speed: Speed
) -> Missed | None:
    """Of layouts that would be faster, the one that lacks least, if that is not half a card."""
    reached = best.plan.step.tokens_per_second_per_gpu
    nearest: Missed | None = None
    limit = request.cluster.card.memory_gib / 2
    for at_least, layout in sorted(missing, key=lambda pair: pair[0]):
        if at_least >= limit:
            break
        if speed.rate_at_most(layout.workload) <= reached:
            continue
        lacks = _lacks_exactly(layout, request)
        if lacks >= limit:
            continue
        rate = speed.step(layout.workload).tokens_per_second_per_gpu
        if rate > reached:
            limit = lacks
            nearest = Missed(
                workload=layout.workload, recompute=layout.recompute, lacks_gib=lacks,
                faster=rate / reached - 1,
            )  # fmt: skip
    return nearest
