"""Memory of every stage in closed form: sums of counted units, for the search.

What the search recommends is counted on the whole stages afterwards.
"""

from collections.abc import Iterator, Sequence

from megatron_dsv3.config.placement import Stage, place
from megatron_dsv3.plan.memory import UNUSABLE, buffers, over_the_schedule
from megatron_dsv3.plan.records import Activations, StageMemory, States, Workload
from megatron_dsv3.plan.states import cache_bytes, optimizer_bytes
from megatron_dsv3.plan.units import chunk_of, units_of


def estimate(workload: Workload) -> tuple[StageMemory, ...]:
    """The fullest rank of every stage."""
    chunks = list(_ranks(workload))
    pairs = zip(stage_states(workload), stage_activations(workload), strict=True)
    return tuple(
        StageMemory(
            pp_rank=pp_rank,
            letters=" ".join(stage.letters for stage in chunks[pp_rank]),
            states=states,
            activations=activations,
            buffers=buffers(workload),
            fragmentation=int(UNUSABLE * (states.gpu + activations.total)),
        )
        for pp_rank, (states, activations) in enumerate(pairs)
    )


def stage_states(workload: Workload) -> list[States]:
    """Weights, gradients, masters and moments of one rank of each stage."""
    return [_states(workload, stages) for stages in _ranks(workload)]


def stage_activations(workload: Workload) -> list[Activations]:
    """What comes and goes on one rank of each stage."""
    return [
        over_the_schedule(workload, pp_rank, [chunk_of(stage, workload) for stage in stages])
        for pp_rank, stages in enumerate(_ranks(workload))
    ]


def _ranks(workload: Workload) -> Iterator[Sequence[Stage]]:
    """The chunks of each pipeline rank."""
    stages = place(workload.arch, workload.parallel)
    for pp_rank in range(workload.parallel.pp_size):
        yield stages[pp_rank :: workload.parallel.pp_size]


def _states(workload: Workload, stages: Sequence[Stage]) -> States:
    parallel, optimizer = workload.parallel, workload.optimizer
    units = [unit for stage in stages for unit in units_of(stage, workload)]
    common = sum(unit.common for unit in units)
    experts = sum(unit.experts for unit in units) / parallel.ep_size
    instances = parallel.num_optimizer_instances
    copies = parallel.dp_size(workload.world_size) * parallel.cp_size / instances
    share = common / copies + experts / (parallel.edp_size(workload.world_size) / instances)
    own = optimizer_bytes(optimizer, workload.precision)
    weight = 2 if workload.precision.compute == "bf16" else 4
    gradient = 2 if optimizer.gradients == "bf16" else 4
    copied = sum(unit.products for unit in units) + experts
    shapes = {shape for unit in units for shape in unit.shapes}
    return States(
        parameters=int(common + experts),
        weights=int(weight * (common + experts)),
        gradients=int(gradient * (common + experts)),
        optimizer=int(own.gpu * share),
        optimizer_host=int(own.host * share),
        caches=cache_bytes(shapes, copied, workload.precision),
    )
