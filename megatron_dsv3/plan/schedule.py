"""The pipeline's schedule, event by event: who computes what when, who waits, what is in flight.

Orders are those of Megatron-Core: 1F1B with one chunk a stage, interleaved with several. A test
holds them to what its schedule functions do.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

MAX_SIMULATED_GROUPS = 6
"""Groups of pp_size micro-batches that are simulated; later ones repeat the last."""


@dataclass(frozen=True, slots=True)
class Task:
    """One pass of one micro-batch through one chunk of a stage."""

    is_forward: bool
    chunk: int
    """Virtual stage, counted on its own pipeline stage."""
    micro_batch: int


@dataclass(frozen=True, slots=True)
class Event:
    """A task when it ran, in seconds from the start of the step."""

    pp_rank: int
    task: Task
    start: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds of each chunk's passes, in the order in which a token meets the chunks."""

    forward: Sequence[float]
    backward: Sequence[float]
    """Recomputation included."""
    hop: float = 0.0
    """Of a micro-batch's hidden states from one stage to the next."""
    overlapped_hops: bool = False
    """Whether a stage computes on while it sends; else it waits until the message is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One step's forward and backward passes over all stages."""

    events: Sequence[Event]
    """Of the micro-batches that were simulated."""
    seconds: float
    """Until the last stage is done, of all micro-batches."""
    busy: Sequence[float]
    """Seconds that each stage computes."""

    @property
    def bubble(self) -> float:
        """Seconds that the busiest stage waits."""
        return self.seconds - max(self.busy)


def order(
    pp_rank: int, *, pp_size: int, vpp_size: int, num_micro_batches: int, num_ahead: int = 0
) -> list[Task]:
    """What one stage computes, in its order.

    Args:
        pp_rank: The stage.
        pp_size: Stages.
        vpp_size: Chunks of a stage.
        num_micro_batches: Of a step.
        num_ahead: Forward passes more before the first backward; 1 where all-to-alls overlap, for
            each is computed beside another one's backward.
    """
    forwards = _forwards(pp_size, vpp_size, num_micro_batches)
    # Backward meets the chunks from the last to the first.
    backwards = [Task(False, vpp_size - 1 - task.chunk, task.micro_batch) for task in forwards]
    num_warmup = min(_num_warmup(pp_rank, pp_size, vpp_size) + num_ahead, len(forwards))
    tasks = forwards[:num_warmup]
    for forward, backward in zip(forwards[num_warmup:], backwards, strict=False):
        tasks += [forward, backward]
    return tasks + backwards[len(forwards) - num_warmup :]


def peak_in_flight(tasks: Sequence[Task], weights: Sequence[float]) -> float:
    """Largest sum of what micro-batches between their forward and backward hold.

    Args:
        tasks: Of one stage, from `order`.
        weights: What one micro-batch holds in each chunk (bytes; ones to count).
    """
    held = peak = 0.0
    for task in tasks:
        held += weights[task.chunk] * (1 if task.is_forward else -1)
        peak = max(peak, held)
    return peak


def counts_at_peak(tasks: Sequence[Task], weights: Sequence[float]) -> tuple[int, ...]:
    """Micro-batches in flight in each chunk at the moment when `weights` sum up highest."""
    counts = [0] * len(weights)
    best, peak = tuple(counts), 0.0
    for task in tasks:
        counts[task.chunk] += 1 if task.is_forward else -1
        held = sum(w * n for w, n in zip(weights, counts, strict=True))
        if held > peak:
            best, peak = tuple(counts), held
    return best


@functools.cache
def in_flight_at_peak(
    pp_rank: int,
    weights: tuple[float, ...],
    *,
    pp_size: int,
    vpp_size: int,
    num_micro_batches: int,
    num_ahead: int,
) -> tuple[int, ...]:
    """Micro-batches of each chunk of a stage at once, when they weigh most.

    Args:
        pp_rank: The stage.
        weights: What one micro-batch holds in each chunk; round them, to be asked the same again.
        pp_size: Stages.
        vpp_size: Chunks of a stage.
        num_micro_batches: Of a step.
        num_ahead: As in `order`.
    """
    if vpp_size == 1:
        return (min(pp_size - pp_rank + num_ahead, num_micro_batches),)
    # More than a warm-up's worth of micro-batches changes nothing.
    most = min(num_micro_batches, (vpp_size + 2) * pp_size)
    tasks = order(
        pp_rank, pp_size=pp_size, vpp_size=vpp_size, num_micro_batches=most, num_ahead=num_ahead
    )
    return counts_at_peak(tasks, weights)


def simulate(
    costs: Costs, *, pp_size: int, vpp_size: int, num_micro_batches: int, whole: bool = False
) -> Timeline:
    """Runs the schedule on a clock.

    In the steady state each group of pp_size micro-batches takes as long as the one before, so of
    many only the first are simulated.

    Args:
        costs: Of pp_size * vpp_size chunks.
        pp_size: Stages.
        vpp_size: Chunks of a stage.
        num_micro_batches: Of a step; where vpp_size > 1, a multiple of pp_size.
        whole: Simulate all micro-batches.
    """
    simulated = MAX_SIMULATED_GROUPS * pp_size + num_micro_batches % pp_size
    if whole or num_micro_batches <= simulated:
        return _simulate(costs, pp_size, vpp_size, num_micro_batches)
    shorter = _simulate(costs, pp_size, vpp_size, simulated - pp_size)
    longer = _simulate(costs, pp_size, vpp_size, simulated)
    repeats = (num_micro_batches - simulated) // pp_size
    return Timeline(
        events=longer.events,
        seconds=longer.seconds + repeats * (longer.seconds - shorter.seconds),
        busy=[busy * num_micro_batches / simulated for busy in longer.busy],
    )


def _forwards(pp_size: int, vpp_size: int, num_micro_batches: int) -> list[Task]:
    """Groups of pp_size micro-batches pass a stage's chunks one after another."""
    return [
        Task(True, chunk, micro_batch)
        for first in range(0, num_micro_batches, pp_size)
        for chunk in range(vpp_size)
        for micro_batch in range(first, min(first + pp_size, num_micro_batches))
    ]


def _num_warmup(pp_rank: int, pp_size: int, vpp_size: int) -> int:
    """Forward passes before the first backward."""
    behind = pp_size - pp_rank - 1
    return behind if vpp_size == 1 else 2 * behind + (vpp_size - 1) * pp_size


@dataclass(slots=True)
class _Stage:
    """A stage while the clock runs."""

    tasks: list[Task]
    at: int = 0
    free: float = 0.0
    busy: float = 0.0


def _simulate(costs: Costs, pp_size: int, vpp_size: int, num_micro_batches: int) -> Timeline:
    stages = [
        _Stage(order(r, pp_size=pp_size, vpp_size=vpp_size, num_micro_batches=num_micro_batches))
        for r in range(pp_size)
    ]
    num_chunks = pp_size * vpp_size
    # Of (forward?, chunk of the model, micro-batch): when the result is where it is needed next.
    ready: dict[tuple[bool, int, int], float] = {}
    events = []
    moved = True
    while moved:
        moved = False
        for pp_rank, stage in enumerate(stages):
            while stage.at < len(stage.tasks):
                task = stage.tasks[stage.at]
                chunk = task.chunk * pp_size + pp_rank
                needed = _needed(task, chunk, num_chunks)
                if needed is not None and needed not in ready:
                    break
                start = max(stage.free, 0.0 if needed is None else ready[needed])
                seconds = (costs.forward if task.is_forward else costs.backward)[chunk]
                end = start + seconds
                hop = costs.hop * _sends(task, chunk, num_chunks) * (pp_size > 1)
                ready[task.is_forward, chunk, task.micro_batch] = end + hop
                stage.free = end if costs.overlapped_hops else end + hop
                stage.busy += seconds
                stage.at += 1
                events.append(Event(pp_rank, task, start, end))
                moved = True
    assert all(stage.at == len(stage.tasks) for stage in stages), "the schedule waits for itself"
    return Timeline(
        events=events,
        seconds=max(event.end for event in events),
        busy=[stage.busy for stage in stages],
    )


def _needed(task: Task, chunk: int, num_chunks: int) -> tuple[bool, int, int] | None:
    """What must have arrived before a task can start; None: nothing."""
    if task.is_forward:
        return (True, chunk - 1, task.micro_batch) if chunk else None
    if chunk == num_chunks - 1:
        return (True, chunk, task.micro_batch)
    return (False, chunk + 1, task.micro_batch)


def _sends(task: Task, chunk: int, num_chunks: int) -> bool:
    return chunk < num_chunks - 1 if task.is_forward else chunk > 0
