"""The layouts that fit, best first, why others lose, and what is missing where none fits."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_dsv3.plan import estimate, sift
from megatron_dsv3.plan.kernels import Kernels
from megatron_dsv3.plan.layouts import Layout, Precision, Request, layouts
from megatron_dsv3.plan.memory import UNUSABLE, buffers
from megatron_dsv3.plan.records import (
    GIB,
    Activations,
    Cluster,
    Plan,
    StageMemory,
    States,
    Workload,
    allocated,
    on_host,
)
from megatron_dsv3.plan.speed import Speed

MemoryModel = Callable[[Workload], Sequence[StageMemory]]
Progress = Callable[[int, int], None]
"""Told how many layouts are done, of how many."""
HOST_RESERVE = 0.25
"""Share of a node's memory for the system, the data, and copies of checkpoints under way."""
MOST_COUNTED = 6
"""Recommendations that are counted before the search gives up on finding one that holds."""
MOST_NODES = 512
SLACK_GIB = 1.5
"""A card: layouts that lack no more by the sift are looked at with counted units as well."""
COUNT_ERROR_GIB = 0.5
"""By which the count of a whole stage may exceed the sum of its units."""
MOST_LOOKED_AT = 4
"""Layouts with counted units, before it is said that nothing fits."""


@dataclass(frozen=True, slots=True)
class _Model:
    """A way to work out memory, for each stage."""

    states: Callable[[Workload], Sequence[States]]
    activations: Callable[[Workload], Sequence[Activations]]


SIFT = _Model(sift.stage_states, sift.stage_activations)
"""Fast, within some percent."""
UNITS = _Model(estimate.stage_states, estimate.stage_activations)
"""From counted layers: seconds for each new way to cut and recompute them, then fast."""


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
    promising: list[tuple[Layout, str]] = []
    missing: list[tuple[float, Layout]] = []
    for number, layout in enumerate(everything):
        on_progress(number, len(everything))
        rung = _first_rung(layout, request, SIFT, slack=SLACK_GIB)
        if rung.name is None:
            missing.append((rung.lacks_gib, layout))
        else:
            promising.append((layout, rung.name))
    speed = Speed(request.cluster, kernels)
    found, failed = _best(promising, request, speed, top)
    missing += failed
    if exact is not None:
        found = _counted(found, request, exact)
    if not found:
        raise ValueError(what_is_missing(request, missing))
    on_progress(len(everything), len(everything))
    return Result(
        found=tuple(found),
        missed=_nearest_miss(missing, request, found[0], speed),
        num_layouts=len(everything),
        num_fitting=len(promising) - len(failed),
    )


def fits(request: Request) -> bool:
    """Whether any layout does; the most spacious are looked at with counted units."""
    spare: list[tuple[float, int, Layout]] = []
    for number, layout in enumerate(layouts(request)):
        if _first_rung(layout, request, SIFT, slack=SLACK_GIB).name is not None:
            lacks = _lacks_at_least(layout, request, SIFT)
            spare.append((lacks, number, layout))
    nearest = heapq.nsmallest(MOST_LOOKED_AT, spare)
    return any(_lacks_at_least(layout, request, UNITS) <= 0 for _, _, layout in nearest)


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


def _first_rung(layout: Layout, request: Request, model: _Model, *, slack: float = 0.0) -> _Rung:
    """Where none fits, `lacks_gib` may be too low: activations are looked at only if states fit."""
    activations: Sequence[Activations] = []
    lacks = float("inf")
    for name in filter(layout.takes, request.states):
        states = model.states(layout.with_states(name))
        if _host_lacks(states, activations, request.cluster) > 0:
            continue
        short = _lacks(states, [], layout.workload, request)
        if short <= slack:
            activations = activations or model.activations(layout.workload)
            short = _lacks(states, activations, layout.workload, request)
            if _host_lacks(states, activations, request.cluster) > 0:
                continue
        if short <= slack:
            return _Rung(name, 0.0)
        lacks = min(lacks, short)
    return _Rung(None, lacks)


def _lacks_at_least(layout: Layout, request: Request, model: _Model) -> float:
    """GiB a card, with the rung that comes nearest; infinite where host memory rules all out."""
    activations = model.activations(layout.workload)
    lacks = float("inf")
    for name in filter(layout.takes, request.states):
        states = model.states(layout.with_states(name))
        if _host_lacks(states, activations, request.cluster) <= 0:
            lacks = min(lacks, _lacks(states, activations, layout.workload, request))
    return lacks


def _nearest(missing: Sequence[tuple[float, Layout]], request: Request) -> float:
    """The least that any layout lacks, in GiB a card."""
    least, nearest = float("inf"), None
    for at_least, layout in sorted(missing, key=lambda pair: pair[0]):
        if at_least >= least:
            break
        lacks = _lacks_at_least(layout, request, SIFT)
        if lacks < least:
            least, nearest = lacks, layout
    return least if nearest is None else _lacks_at_least(nearest, request, UNITS)


def _lacks(
    states: Sequence[States],
    activations: Sequence[Activations],
    workload: Workload,
    request: Request,
) -> float:
    """GiB that the fullest card lacks; negative: has left. Without activations, at least."""
    totals = [held.gpu for held in states]
    if activations:
        totals = [allocated(*pair) for pair in zip(states, activations, strict=True)]
    total = max(totals) * (1 + UNUSABLE) + buffers(workload)
    return total / GIB + request.spare_gib - request.cluster.card.memory_gib


def _host_lacks(
    states: Sequence[States], activations: Sequence[Activations], cluster: Cluster
) -> float:
    """GiB that a node lacks; negative: has left. Without activations, at least."""
    sizes = [held.optimizer_host for held in states]
    if activations:
        sizes = [on_host(*pair) for pair in zip(states, activations, strict=True)]
    needed = max(sizes) * cluster.gpus_per_node / GIB
    return needed - (1 - HOST_RESERVE) * cluster.host_memory_gib


def _best(
    promising: Sequence[tuple[Layout, str]], request: Request, speed: Speed, top: int
) -> tuple[list[Found], list[tuple[float, Layout]]]:
    """Simulated best first by what they can reach at most, until none can be among the best.

    Returns:
        The best, and those that counted units show not to fit, with what they lack in GiB.
    """
    ranked = [
        (-speed.rate_at_most(layout.with_states(rung)), number)
        for number, (layout, rung) in enumerate(promising)
    ]
    heapq.heapify(ranked)
    found: list[Found] = []
    failed: list[tuple[float, Layout]] = []
    while ranked:
        at_most, number = heapq.heappop(ranked)
        if len(found) >= top and -at_most <= _rate(found[-1]):
            break
        layout, _ = promising[number]
        rung = _first_rung(layout, request, UNITS)
        if rung.name is None:
            failed.append((rung.lacks_gib, layout))
            continue
        found.append(_found(layout, rung.name, request, speed))
        found.sort(key=_rate, reverse=True)
        del found[top:]
    return found, failed


def _rate(found: Found) -> float:
    return found.plan.step.tokens_per_second_per_gpu


def _found(layout: Layout, rung: str, request: Request, speed: Speed) -> Found:
    workload = layout.with_states(rung)
    plan = Plan(
        workload=workload,
        cluster=request.cluster,
        stages=estimate.estimate(workload),
        step=speed.step(workload),
    )
    return Found(
        plan=plan,
        recompute=layout.recompute,
        states=rung,
        precision=layout.precision,
        counted=False,
    )


def _counted(found: Sequence[Found], request: Request, exact: MemoryModel) -> list[Found]:
    """From the first on whose counted memory fits, too; the others after it as they are."""
    for index, one in enumerate(found[:MOST_COUNTED]):
        plan = replace(one.plan, stages=tuple(exact(one.plan.workload)))
        if plan.spare_gib >= request.spare_gib - COUNT_ERROR_GIB:
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
        lacks = _lacks_at_least(layout, request, SIFT)
        if lacks >= limit:
            continue
        rate = speed.step(layout.workload).tokens_per_second_per_gpu
        if rate <= reached:
            continue
        lacks = _lacks_at_least(layout, request, UNITS)
        # Not the card's: host memory is what some lack.
        if 0 < lacks < limit:
            limit = lacks
            nearest = Missed(
                workload=layout.workload, recompute=layout.recompute, lacks_gib=lacks,
                faster=rate / reached - 1,
            )  # fmt: skip
    return nearest
