"""Memory of every stage of a workload: states and activations put together along the schedule.

`count_memory` builds every distinct stage; `units.Units` gives the same from counted layers, for
the search. Both put chunks and micro-batches together here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_dsv3.config.placement import Stage, place
from megatron_dsv3.plan.activations import HELD, Counted, count
from megatron_dsv3.plan.build import built
from megatron_dsv3.plan.byte_rules import UNUSABLE, buffer_bytes
from megatron_dsv3.plan.records import Activations, StageMemory, States, Workload
from megatron_dsv3.plan.schedule import counts_at_peak, order
from megatron_dsv3.plan.states import BuildOptimizer, count_states


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
    activations = _over_the_schedule(workload, pp_rank, parts.chunks)
    return StageMemory(
        pp_rank=pp_rank,
        letters=" ".join(stage.letters for stage in stages if stage.pp_rank == pp_rank),
        states=parts.states,
        activations=activations,
        buffers=buffer_bytes(workload),
        fragmentation=int(UNUSABLE * activations.total),
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


def _over_the_schedule(workload: Workload, pp_rank: int, chunks: Sequence[Counted]) -> Activations:
    """All micro-batches in flight, and the one whose backward takes most on top."""
    parallel = workload.parallel
    tasks = order(
        pp_rank,
        pp_size=parallel.pp_size,
        vpp_size=parallel.vpp_size,
        # Later micro-batches find as many in flight as these.
        num_micro_batches=min(workload.num_micro_batches, 4 * parallel.pp_size),
    )
    weights = [float(sum(chunk.held.values())) for chunk in chunks]
    in_flight = counts_at_peak(tasks, weights)
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
    )
