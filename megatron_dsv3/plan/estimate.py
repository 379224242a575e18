"""Memory of every stage in closed form: sums of counted units, for the search.

What the search recommends is counted on the whole stages afterwards.
"""

from megatron_dsv3.config.placement import place
from megatron_dsv3.plan.memory import UNUSABLE, buffers, over_the_schedule
from megatron_dsv3.plan.records import Activations, StageMemory, States, Workload, allocated
from megatron_dsv3.plan.states import cache_bytes, optimizer_bytes, update_bytes
from megatron_dsv3.plan.units import (
    Parameters,
    activations_of,
    cut_of,
    names_of_ranks,
    parameters_of,
)


def estimate(workload: Workload) -> tuple[StageMemory, ...]:
    """The fullest rank of every stage."""
    chunks = place(workload.arch, workload.parallel)
    pairs = zip(stage_states(workload), stage_activations(workload), strict=True)
    return tuple(
        StageMemory(
            pp_rank=pp_rank,
            letters=" ".join(c.letters for c in chunks[pp_rank :: workload.parallel.pp_size]),
            states=states,
            activations=activations,
            buffers=buffers(workload),
            fragmentation=int(UNUSABLE * allocated(states, activations)),
        )
        for pp_rank, (states, activations) in enumerate(pairs)
    )


def stage_states(workload: Workload) -> list[States]:
    """Weights, gradients, masters and moments of one rank of each stage."""
    cut = cut_of(workload)
    ranks = names_of_ranks(workload.arch, workload.parallel)
    # Most stages are alike.
    known = {
        chunks: _states(workload, parameters_of(chunks, workload.arch, cut))
        for chunks in set(ranks)
    }
    return [known[chunks] for chunks in ranks]


def stage_activations(workload: Workload) -> list[Activations]:
    """What comes and goes on one rank of each stage."""
    arch, cut, tokens = workload.arch, cut_of(workload), workload.tokens_per_rank
    ranks = names_of_ranks(arch, workload.parallel)
    known = {
        chunks: [activations_of(names, arch, cut, tokens) for names in chunks]
        for chunks in set(ranks)
    }
    return [
        over_the_schedule(workload, pp_rank, known[chunks]) for pp_rank, chunks in enumerate(ranks)
    ]


def _states(workload: Workload, held: Parameters) -> States:
    parallel, optimizer = workload.parallel, workload.optimizer
    experts = held.experts / parallel.ep_size
    instances = parallel.num_optimizer_instances
    copies = parallel.dp_size(workload.world_size) * parallel.cp_size / instances
    expert_share = experts / (parallel.edp_size(workload.world_size) / instances)
    share = held.common / copies + expert_share
    products = held.products / copies + expert_share
    own = optimizer_bytes(optimizer, workload.precision)
    weight = 2 if workload.precision.compute == "bf16" else 4
    gradient = 2 if optimizer.gradients == "bf16" else 4
    return States(
        parameters=int(held.common + experts),
        weights=int(weight * (held.common + experts)),
        gradients=int(gradient * (held.common + experts)),
        optimizer=int(own.gpu * share),
        optimizer_host=int(own.host * share),
        caches=cache_bytes(held.empty, held.products + experts, workload.precision),
        update=update_bytes(share, products, workload),
    )
