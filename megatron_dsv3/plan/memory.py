"""Memory of every stage of a workload: states and activations put together along the schedule.

`count_memory` builds every distinct stage; `units.Units` gives the same from counted layers, for
the search. Both put chunks and micro-batches together here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_dsv3.config.placement import Stage, place
from megatron_dsv3.plan.activations import HELD, Counted, count
from megatron_dsv3.plan.build import built
from megatron_dsv3.plan.records import (
    GIB,
    Activations,
    StageMemory,
    States,
    Workload,
    allocated,
)
from megatron_dsv3.plan.schedule import in_flight_at_peak
from megatron_dsv3.plan.states import BuildOptimizer, count_states

CONTEXT = int(0.8 * GIB)
"""What CUDA and its libraries take of a card before the first tensor."""
COMMUNICATOR = int(0.12 * GIB)
"""NCCL's channels of one group that this rank belongs to."""
UNUSABLE = 0.03
"""Share of what is allocated that the allocator's blocks leave unused beside it, with segments that
grow (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True)."""


@dataclass(frozen=True, slots=True)
class StageParts:
    """What one rank of a stage holds."""

    states: States
    chunks: Sequence[Counted]
    """In virtual-pipeline order."""


def count_memory(
    workload: Workload,
    build_optimizer: BuildOptimizer,
    *,
    on_stage: Callable[[int], None] = lambda _: None,
) -> tuple[StageMemory, ...]:
    """Exact for states, counted for activations; takes about a second for each distinct stage.

    Args:
        workload: What is planned.
        build_optimizer: `train.optimizer.build_optimizer`.
        on_stage: Called with each pipeline rank that is done.
    """
    stages = place(workload.arch, workload.parallel)
    known: dict[object, StageParts] = {}
    memories = []
    for pp_rank in range(workload.parallel.pp_size):
        key = tuple(_likeness(s, workload) for s in stages if s.pp_rank == pp_rank)
        if key not in known:
            with built(workload, pp_rank) as rank:
                states = count_states(rank, workload, build_optimizer)
                known[key] = StageParts(states, count(rank, workload))
        memories.append(put_together(workload, pp_rank, known[key]))
        on_stage(pp_rank)
    return tuple(memories)


def put_together(workload: Workload, pp_rank: int, parts: StageParts) -> StageMemory:
    """One rank over a whole step."""
    stages = place(workload.arch, workload.parallel)
    activations = over_the_schedule(workload, pp_rank, parts.chunks)
    return StageMemory(
        pp_rank=pp_rank,
        letters=" ".join(stage.letters for stage in stages if stage.pp_rank == pp_rank),
        states=parts.states,
        activations=activations,
        buffers=buffers(workload),
        fragmentation=int(UNUSABLE * allocated(parts.states, activations)),
    )


def _likeness(stage: Stage, workload: Workload) -> object:
    """Equal for chunks that hold the same."""
    arch, precision = workload.arch, workload.precision
    behind = arch.num_layers - precision.bf16_last_layers
    layers = tuple(
        (arch.is_moe_layer(layer), precision.bf16_first_layers <= layer < behind)
        for layer in stage.layers
    )
    ends = (stage.has_embedding, stage.has_final_norm, stage.has_loss)
    return (layers, stage.mtp_layers, ends)


def over_the_schedule(workload: Workload, pp_rank: int, chunks: Sequence[Counted]) -> Activations:
    """All micro-batches in flight, and the one whose backward takes most on top."""
    weights = [float(sum(chunk.held.values())) for chunk in chunks]
    # Rounded, so that the search asks for the same schedule again and again.
    relative = tuple(round(weight / (max(weights) or 1.0), 2) for weight in weights)
    in_flight = in_flight_at_peak(
        pp_rank,
        relative,
        pp_size=workload.parallel.pp_size,
        vpp_size=workload.parallel.vpp_size,
        num_micro_batches=workload.num_micro_batches,
        num_ahead=workload.num_ahead,
    )
    there = [chunk for chunk, number in zip(chunks, in_flight, strict=True) if number]
    highest = max(there, key=lambda chunk: sum(chunk.peak.values()) - sum(chunk.held.values()))
    sizes = {
        kind: sum(n * chunk.held.get(kind, 0) for n, chunk in zip(in_flight, chunks, strict=True))
        - highest.held.get(kind, 0)
        + highest.peak.get(kind, 0)
        for kind in HELD
    }
    return Activations(
        **sizes,
        recomputed=highest.peak.get("recomputed", 0),
        working=highest.peak.get("working", 0),
        in_flight=sum(in_flight) / len(in_flight),
        host=sum(n * chunk.host for n, chunk in zip(in_flight, chunks, strict=True)),
    )


def buffers(workload: Workload) -> int:
    """What is taken of a card beside tensors."""
    return CONTEXT + COMMUNICATOR * _num_groups(workload)


def _num_groups(workload: Workload) -> int:
    """Groups of more than one rank through which this rank talks."""
    parallel = workload.parallel
    world_size = workload.world_size
    sizes = (
        parallel.tp_size,
        parallel.pp_size,
        parallel.cp_size,
        parallel.ep_size,
        parallel.etp_size,
        parallel.dp_size(world_size) * parallel.cp_size,
        parallel.edp_size(world_size),
    )
    return sum(size > 1 for size in sizes)
