"""Any stage from counted pieces of the model: the closed form that the search sifts layouts with.

Embedding, a dense layer, an expert layer and the end of the model are each built and counted on a
stage of their own, once for each way to cut and recompute them. Activations grow with the tokens of
a rank alone, so one count serves every sequence length, and chunks are sums of their units. A test
holds the sums to the count of whole stages within 1%.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.placement import Stage
from megatron_dsv3.config.sections import MemorySection, PrecisionSection
from megatron_dsv3.plan.activations import Counted, count
from megatron_dsv3.plan.build import built
from megatron_dsv3.plan.records import Workload
from megatron_dsv3.plan.states import product_weights

TOKENS = 4096
"""Of a rank, that units are counted with."""
STAGES = ("embedding", "dense", "moe", "last", "end")
"""Of the small model that is cut into its units. `last`: an expert layer and the norm after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What one rank holds of a unit. Activations are bytes a token of it, of one micro-batch."""

    held: Mapping[str, float]
    """Between forward and backward, by kind."""
    peak: Mapping[str, float]
    """Alone, at its own peak."""
    left: float
    """After its backward."""
    common: int
    """Parameters outside the routed experts, which every data-parallel rank has."""
    experts: int
    """Parameters of all routed experts together, of one expert-tensor-parallel rank."""
    products: int
    """Of `common`, those of products that FP8 recipes are about."""
    shapes: frozenset[tuple[int, ...]]
    """Of weights whose gradients go straight into their buffer."""


def units_of(stage: Stage, workload: Workload) -> list[Unit]:
    """The units of a chunk, in the order in which a token passes them."""
    return [_unit(name, *_key(workload)) for name in _names(stage, workload.arch)]


def chunk_of(stage: Stage, workload: Workload) -> Counted:
    """One micro-batch in one chunk, as `activations.count` would count it."""
    names = tuple(_names(stage, workload.arch))
    return _chunk(names, *_key(workload), workload.tokens_per_rank)


def _names(stage: Stage, arch: Architecture) -> list[str]:
    names = ["embedding"] * stage.has_embedding
    names += ["moe" if arch.is_moe_layer(layer) else "dense" for layer in stage.layers]
    if stage.has_final_norm and stage.layers and not stage.has_loss:
        names[-1] = "last"
    return names + ["end"] * bool(stage.mtp_layers or stage.has_loss)


@functools.cache
def _chunk(names: tuple[str, ...], arch: Architecture, cut: "_Cut", tokens: int) -> Counted:
    """Backward takes the units from the last to the first: each peaks on top of those before."""
    units = [_unit(name, arch, cut) for name in names]
    held: dict[str, float] = {}
    peak: dict[str, float] = {}
    left = whole = sum(unit.left for unit in units)
    for unit in units:
        left -= unit.left
        here = _sum(held, _sum(unit.peak, {"working": left}))
        if sum(here.values()) > sum(peak.values()):
            peak = here
        held = _sum(held, unit.held)
    return Counted(
        held={kind: round(size * tokens) for kind, size in held.items()},
        peak={kind: round(size * tokens) for kind, size in peak.items()},
        left=round(whole * tokens),
        modules={},
    )


def _sum(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {
        kind: first.get(kind, 0.0) + second.get(kind, 0.0) for kind in first.keys() | second.keys()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """What a unit depends on besides the model."""

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
        (chunk,) = rank.chunks
    sizes = {name: parameter.numel() for name, parameter in chunk.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    weights = product_weights(chunk)
    return Unit(
        held={kind: size / TOKENS for kind, size in counted.held.items()},
        peak={kind: size / TOKENS for kind, size in counted.peak.items()},
        left=counted.left / TOKENS,
        common=sum(sizes.values()) - experts,
        experts=experts * small.parallel.ep_size,
        products=sum(w.size for w in weights if w.is_product and not w.is_expert),
        shapes=frozenset(w.shape for w in weights),
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
    return Workload(
        arch=replace(arch, num_layers=3, num_dense_layers=1),
        parallel=parallel,
        world_size=len(STAGES) * math.lcm(cut.tp_size * cp_size, ep_size * cut.etp_size),
        seq_length=TOKENS * cp_size,
        memory=cut.memory,
        precision=cut.precision,
        imbalance=cut.imbalance,
    )
