"""Any stage from counted pieces of the model: the closed form that the search sifts layouts with.

Embedding, a dense layer, an expert layer and the end of the model are each built and counted on a
stage of their own, once for each way to cut and recompute them. Activations grow with the tokens of
a rank alone, so one count serves every sequence length, and chunks are sums of their units. A test
holds the sums to the count of whole stages within 1%.
"""

import functools
import gzip
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import Any, Literal

from megatron_dsv3.config.architecture import DEEPSEEK_V3, Architecture
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.placement import Stage, place
from megatron_dsv3.config.sections import MemorySection, PrecisionSection
from megatron_dsv3.plan.activations import Counted, count
from megatron_dsv3.plan.build import built
from megatron_dsv3.plan.records import Workload
from megatron_dsv3.plan.states import product_weights

TOKENS = 4096
"""Of a rank, that units are counted with."""
TABLE = "units.json.gz"
EP_SIZE = 8
"""Of the small model, where there is any."""
STAGES = ("embedding", "dense", "moe", "last", "end")
"""Of the small model that is cut into its units. `last`: an expert layer and the norm after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What one rank holds of a unit. Activations are bytes a token of it, of one micro-batch."""

    held: Mapping[str, float]
    """Between forward and backward, by kind."""
    peak: Mapping[str, float]
    """Alone, at its own peak."""
    host: float
    """In host memory, between forward and backward."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What one rank of a stage holds, before data parallelism shares it out."""

    common: int
    experts: int
    """Of all expert-parallel ranks together."""
    products: int
    empty: int
    """Numbers in the different shapes of weights whose gradients go straight into their buffer."""


Names = tuple[str, ...]
"""Units of a chunk, in the order in which a token passes them."""


@functools.cache
def names_of_ranks(arch: Architecture, parallel: Parallel) -> tuple[tuple[Names, ...], ...]:
    """The units of every chunk of every pipeline rank."""
    names = [_names(stage, arch) for stage in place(arch, parallel)]
    return tuple(tuple(names[rank :: parallel.pp_size]) for rank in range(parallel.pp_size))


def _names(stage: Stage, arch: Architecture) -> Names:
    names = ["embedding"] * stage.has_embedding
    names += ["moe" if arch.is_moe_layer(layer) else "dense" for layer in stage.layers]
    if stage.has_final_norm and stage.layers and not stage.has_loss:
        names[-1] = "last"
    return tuple(names + ["end"] * bool(stage.mtp_layers or stage.has_loss))


@functools.cache
def parameters_of(chunks: tuple[Names, ...], arch: Architecture, cut: "Cut") -> Parameters:
    """Of one rank's chunks."""
    units = [unit_of(name, arch, cut) for names in chunks for name in names]
    shapes = {shape for unit in units for shape in unit.shapes}
    # MTP layers have an embedding of their own only where the model's is in another chunk.
    whole = sum({"embedding", "end"} <= set(names) for names in chunks)
    twice = whole * bool(arch.num_mtp_layers) * unit_of("embedding", arch, cut).common
    return Parameters(
        common=sum(unit.common for unit in units) - twice,
        experts=sum(unit.experts for unit in units),
        products=sum(unit.products for unit in units),
        empty=sum(math.prod(shape) for shape in shapes),
    )


@functools.cache
def activations_of(names: Names, arch: Architecture, cut: "Cut", tokens: int) -> Counted:
    """One micro-batch in one chunk, as `activations.count` would count it.

    Backward takes the units from the last to the first: each peaks on top of those before.
    """
    units = [unit_of(name, arch, cut) for name in names]
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
        host=round(sum(unit.host for unit in units) * tokens),
        left=round(whole * tokens),
        modules={},
    )


def _sum(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {
        kind: first.get(kind, 0.0) + second.get(kind, 0.0) for kind in first.keys() | second.keys()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What a unit depends on besides the model."""

    tp_size: int
    etp_size: int
    has_ep: bool
    has_cp: bool
    precision: PrecisionSection
    memory: MemorySection
    imbalance: float


def cut_of(workload: Workload) -> Cut:
    """How this workload cuts and recomputes its units."""
    parallel, precision = workload.parallel, workload.precision
    return Cut(
        tp_size=parallel.tp_size,
        etp_size=parallel.etp_size,
        has_ep=parallel.ep_size > 1,
        has_cp=parallel.cp_size > 1,
        precision=_plain(precision.compute, precision.fp8),
        memory=workload.memory,
        imbalance=workload.imbalance,
    )


@functools.cache
def _plain(compute: Literal["bf16", "fp32"], fp8: Any) -> PrecisionSection:
    """What differs at the ends, and where weights are kept, is not the layers' activations."""
    return PrecisionSection(compute=compute, fp8=fp8)


@functools.cache
def unit_of(name: str, arch: Architecture, cut: Cut) -> Unit:
    """A unit, looked up where it was counted before."""
    known = _counted_before().get(_entry(name, cut)) if arch == DEEPSEEK_V3 else None
    if known is None:
        return count_unit(name, arch, cut)
    return Unit(**{**known, "shapes": frozenset(map(tuple, known["shapes"]))})


def count_unit(name: str, arch: Architecture, cut: Cut) -> Unit:
    """Builds a unit and runs it, in a tenth of a second."""
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
        host=counted.host / TOKENS,
        left=counted.left / TOKENS,
        common=sum(sizes.values()) - experts,
        experts=experts * small.parallel.ep_size,
        products=sum(w.size for w in weights if w.is_product and not w.is_expert),
        shapes=frozenset(w.shape for w in weights),
    )


def to_table(cuts: Iterable[Cut], on_cut: Callable[[], None] = lambda: None) -> bytes:
    """Counts all units of the 671B for these cuts, as the file that comes with the package."""
    table: dict[str, dict[str, Any]] = {}
    for cut in cuts:
        for name in STAGES:
            unit = asdict(count_unit(name, DEEPSEEK_V3, cut))
            table[_entry(name, cut)] = {**unit, "shapes": sorted(unit["shapes"])}
        on_cut()
    return gzip.compress(json.dumps(table, sort_keys=True).encode(), mtime=0)


@functools.cache
def _counted_before() -> Mapping[str, dict[str, Any]]:
    """The units that the search of the 671B asks for; `scripts/count_units.py` writes them."""
    file = files("megatron_dsv3.plan") / TABLE
    if not file.is_file():
        return {}
    table: Mapping[str, dict[str, Any]] = json.loads(gzip.decompress(file.read_bytes()))
    return table


def _entry(name: str, cut: Cut) -> str:
    memory = cut.memory
    again = ",".join(sorted(memory.recompute_modules)) if memory.recompute == "selective" else ""
    again += "".join(f" -{name}" for name in sorted(memory.offload_activations))
    parts = (
        name, cut.tp_size, cut.etp_size, cut.has_ep, cut.has_cp,
        cut.precision.compute, cut.precision.fp8, memory.recompute, again, cut.imbalance,
    )  # fmt: skip
    return " ".join(map(str, parts))


def _small(arch: Architecture, cut: Cut) -> Workload:
    """The model's units, each on a stage of its own."""
    # Few experts on a rank are quickly built, and how many there are is no matter of memory.
    ep_size = math.gcd(arch.num_experts, EP_SIZE) if cut.has_ep else 1
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
