"""Activations of any stage from counted pieces of the model: the closed form for the search.

Embedding, a dense layer, an expert layer and the end of the model are each counted on a stage of
their own, once for each way to cut and recompute them. All of it grows with the tokens of a rank
alone, so one count serves every sequence length, and chunks are sums of their units. A test holds
the sums to the count of whole stages within 1%.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.placement import Stage
from megatron_dsv3.config.sections import MemorySection, PrecisionSection
from megatron_dsv3.plan.activations import Counted, count
from megatron_dsv3.plan.build import built
from megatron_dsv3.plan.records import Workload

TOKENS = 4096
"""Of a rank, that units are counted with."""
STAGES = ("embedding", "dense", "moe", "last", "end")
"""Of the small model that is cut into its units. `last`: an expert layer and the norm after it."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Bytes for each token of a rank, of one micro-batch."""

    held: Mapping[str, float]
    peak: Mapping[str, float]
    """Alone, at its own peak."""
    left: float
    """After its backward."""


def chunk_of(stage: Stage, workload: Workload) -> Counted:
    """One micro-batch in one chunk, as `activations.count` would count it."""
    names = ["embedding"] * stage.has_embedding
    names += ["moe" if workload.arch.is_moe_layer(layer) else "dense" for layer in stage.layers]
    if stage.has_final_norm and stage.layers and not stage.has_loss:
        names[-1] = "last"
    names += ["end"] * bool(stage.mtp_layers or stage.has_loss)
    units = [_unit(name, *_key(workload)) for name in names]
    return _joined(units, workload.tokens_per_rank)


def _joined(units: Sequence[Unit], tokens: int) -> Counted:
    """Backward takes the units from the last to the first: each peaks on top of those before."""
    held: dict[str, float] = {}
    peak: dict[str, float] = {}
    left = sum(unit.left for unit in units)
    for unit in units:
        left -= unit.left
        here = dict(held)
        here["working"] = left
        for kind, size in unit.peak.items():
            here[kind] = here.get(kind, 0.0) + size
        if sum(here.values()) > sum(peak.values()):
            peak = here
        for kind, size in unit.held.items():
            held[kind] = held.get(kind, 0.0) + size
    return Counted(
        held={kind: round(size * tokens) for kind, size in held.items()},
        peak={kind: round(size * tokens) for kind, size in peak.items()},
        left=round(sum(unit.left for unit in units) * tokens),
        modules={},
    )


@dataclass(frozen=True, slots=True)
class _Cut:
    """What a unit's bytes a token depend on, besides the model."""

    tp_size: int
    etp_size: int
    has_ep: bool
    has_cp: bool
    precision: PrecisionSection
    memory: MemorySection
    imbalance: float


def _key(workload: Workload) -> tuple[Architecture, _Cut]:
    parallel, precision = workload.parallel, workload.precision
    cut = _Cut(
        tp_size=parallel.tp_size,
        etp_size=parallel.etp_size,
        has_ep=parallel.ep_size > 1,
        has_cp=parallel.cp_size > 1,
        # What differs at the ends, and where weights are kept, is not the layers' activations.
        precision=PrecisionSection(compute=precision.compute, fp8=precision.fp8),
        memory=workload.memory,
        imbalance=workload.imbalance,
    )
    return workload.arch, cut


@functools.cache
def _unit(name: str, arch: Architecture, cut: _Cut) -> Unit:
    small = _small(arch, cut)
    with built(small, STAGES.index(name)) as rank:
        (counted,) = count(rank, small)
    return Unit(
        held={kind: size / TOKENS for kind, size in counted.held.items()},
        peak={kind: size / TOKENS for kind, size in counted.peak.items()},
        left=counted.left / TOKENS,
    )


def _small(arch: Architecture, cut: _Cut) -> Workload:
    """The model's units, each on a stage of its own."""
    ep_size = 2 if cut.has_ep else 1
    cp_size = 2 if cut.has_cp else 1
    parallel = Parallel(
        tp_size=cut.tp_size,
        pp_size=len(STAGES),
        cp_size=cp_size,
        ep_size=ep_size,
        etp_size=cut.etp_size,
        stages="E|t|t|t|" + "m" * arch.num_mtp_layers + "L",
    )
    world_size = len(STAGES) * math.lcm(cut.tp_size * cp_size, ep_size * cut.etp_size)
    return Workload(
        arch=replace(arch, num_layers=3, num_dense_layers=1),
        parallel=parallel,
        world_size=world_size,
        seq_length=TOKENS * cp_size,
        memory=cut.memory,
        precision=cut.precision,
        imbalance=cut.imbalance,
    )
