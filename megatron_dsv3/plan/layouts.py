"""All layouts of a request: what the search goes through, cheapest differences last.

A layout is the process grid with its micro-batch, precision and recompute set. How masters, moments
and weights are kept hardly changes the time of a step, so it is no part of a layout: of the ladder
`STATES` the first rung that fits is taken.

Left out is what cannot win: experts cut by tensor parallelism where expert parallelism can deal
them out as finely (`_etp_sizes` says why), and grids whose experts do not fill a node.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.placement import place
from megatron_dsv3.config.sections import MemorySection, OptimizerSection, PrecisionSection
from megatron_dsv3.plan.records import Cluster, Workload

Precision = Literal["bf16", "fp8"]
RECOMPUTE: Mapping[str, MemorySection] = {
    "none": MemorySection(),
    "selective": MemorySection(recompute="selective"),
    "wide": MemorySection(
        recompute="selective",
        recompute_modules=("mla_up_proj", "layernorm", "moe_act", "mlp", "shared_experts"),
    ),
    "inputs offloaded": MemorySection(
        recompute="selective",
        recompute_modules=("mla_up_proj", "layernorm", "moe_act", "mlp", "shared_experts"),
        offload_activations=("expert_fc1",),
    ),
    "experts": MemorySection(
        recompute="selective", recompute_modules=("mla_up_proj", "layernorm", "moe", "mlp")
    ),
    "full": MemorySection(recompute="full"),
}
"""What is computed again or kept in host memory, from the fastest to the smallest.

Of what can be offloaded the experts' inputs alone are tried, with all that is cheap to compute
again: they are the largest tensors, and their copies take about as long as a layer's forward. What
attention holds (queries, keys, values, result) takes longer to copy than to compute again.
"""


@dataclass(frozen=True, slots=True)
class Rung:
    """A way to keep what stays from step to step."""

    optimizer: OptimizerSection
    fp8_params: bool = False
    """Weights in FP8 alone: for layouts in FP8 only."""


def _rung(fp8_params: bool = False, **settings: Any) -> Rung:
    section = OptimizerSection(overlap_grad_reduce=True, overlap_param_gather=True, **settings)
    return Rung(section, fp8_params)


STATES: Mapping[str, Rung] = {
    "fp32 moments": _rung(),
    "fp32 moments, fp8 weights": _rung(fp8_params=True),
    "bf16 moments": _rung(moments="bf16"),
    "bf16 moments, fp8 weights": _rung(fp8_params=True, moments="bf16"),
    # None of these with FP8 weights: Megatron-Core 0.19 offloads the optimizer of weights that can
    # be viewed as rows of numbers, which weights in blocks cannot.
    "half offloaded": _rung(offload_fraction=0.5),
    "offloaded": _rung(offload_fraction=1.0),
    "bf16 moments and gradients": _rung(moments="bf16", gradients="bf16"),
    "bf16 moments and gradients, fp8 weights": _rung(
        fp8_params=True, moments="bf16", gradients="bf16"
    ),
    "offloaded, bf16 gradients": _rung(offload_fraction=1.0, gradients="bf16"),
}
"""What becomes of masters, moments, gradients and weights, from what changes least to what frees
most."""
USUAL_RECOMPUTE = tuple(
    name for name, section in RECOMPUTE.items() if not section.offload_activations
)
"""Without activations in host memory, of which no speed was measured: where a user allows it."""
USUAL_STATES = tuple(name for name in STATES if "gradients" not in name)
"""Without bf16 gradients, which lose what is small beside the sum: only where a user allows it."""
TOKENS_PER_STEP = 2**22
"""Of a global batch, where the request does not say."""
LARGEST_BATCH = 2.0
"""Times `TOKENS_PER_STEP`, where a layout cannot divide that."""
MAX_PP_SIZE = 32
MAX_EXPERT_RANKS = 256
"""Among which the experts of a layer are dealt out or cut."""
MICRO_BATCHES = (1, 2, 4)


def allowed_recompute(*, offload_activations: bool) -> tuple[str, ...]:
    """Sets of `RECOMPUTE` that a user lets the search take."""
    return tuple(RECOMPUTE) if offload_activations else USUAL_RECOMPUTE


def allowed_states(*, moments: str, offload: bool, bf16_gradients: bool) -> tuple[str, ...]:
    """Rungs of `STATES` that a user lets the search take.

    Args:
        moments: fp32, bf16 or any.
        offload: Whether states may live in host memory.
        bf16_gradients: Whether gradients may be summed in bf16.
    """
    names = [
        name
        for name, rung in STATES.items()
        if moments in ("any", rung.optimizer.moments)
        and (offload or rung.optimizer.offload_fraction == 0)
        and (bf16_gradients or rung.optimizer.gradients == "fp32")
    ]
    return tuple(names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks of the search."""

    arch: Architecture
    cluster: Cluster
    nodes: int
    seq_length: int
    document_length: int | None = None
    global_batch_size: int | None = None
    """Rows of a step; None: about `TOKENS_PER_STEP`, as the layout divides it."""
    precisions: tuple[Precision, ...] = ("bf16",)
    states: tuple[str, ...] = USUAL_STATES
    """Rungs of `STATES` that are allowed."""
    recompute: tuple[str, ...] = USUAL_RECOMPUTE
    """Sets of `RECOMPUTE` that are allowed."""
    imbalance: float = 1.2
    spare_gib: float = 3.0
    """Of each card, left free: what is counted is within some percent of what is measured."""

    @property
    def world_size(self) -> int:
        """GPUs."""
        return self.nodes * self.cluster.gpus_per_node


@dataclass(frozen=True, slots=True)
class Layout:
    """A grid with micro-batch, precision and recompute set, its states not yet chosen."""

    workload: Workload
    recompute: str
    precision: Precision

    def takes(self, name: str) -> bool:
        """Whether a rung of `STATES` is one for this layout."""
        return self.precision == "fp8" or not STATES[name].fp8_params

    def with_states(self, name: str) -> Workload:
        """The workload with a rung of `STATES` that it takes."""
        rung = STATES[name]
        precision = _precision(self.precision, rung.fp8_params)
        return replace(self.workload, optimizer=rung.optimizer, precision=precision)


def layouts(request: Request) -> Iterator[Layout]:
    """All that the model's sizes, the world and the batch allow."""
    for parallel in _grids(request):
        for micro_batch_size in MICRO_BATCHES:
            if micro_batch_size * request.seq_length > 2**16 and micro_batch_size > 1:
                continue
            num_micro_batches = _num_micro_batches(request, parallel, micro_batch_size)
            if num_micro_batches is None:
                continue
            for precision, name in itertools.product(request.precisions, request.recompute):
                workload = Workload(
                    arch=request.arch,
                    parallel=parallel,
                    world_size=request.world_size,
                    seq_length=request.seq_length,
                    micro_batch_size=micro_batch_size,
                    num_micro_batches=num_micro_batches,
                    document_length=request.document_length,
                    precision=_precision(precision, False),
                    memory=RECOMPUTE[name],
                    optimizer=STATES[request.states[0]].optimizer,
                    imbalance=request.imbalance,
                )
                if _rows_divide(workload):
                    yield Layout(workload, name, precision)


@functools.cache
def _precision(name: Precision, fp8_params: bool) -> PrecisionSection:
    if name == "bf16":
        return PrecisionSection()
    return PrecisionSection(fp8="blockwise", fp8_params=fp8_params)


def _rows_divide(workload: Workload) -> bool:
    """As the job asks of `data.seq_length`."""
    parallel = workload.parallel
    multiple = parallel.cp_size * parallel.tp_size * workload.precision.row_multiple
    return workload.seq_length % math.lcm(2 * parallel.cp_size, multiple) == 0


def _num_micro_batches(request: Request, parallel: Parallel, micro_batch_size: int) -> int | None:
    """Of a data-parallel rank; None: the batch does not divide."""
    at_once = micro_batch_size * parallel.dp_size(request.world_size)
    group = parallel.pp_size if parallel.vpp_size > 1 else 1
    if request.global_batch_size is None:
        rows = TOKENS_PER_STEP / request.seq_length
        number = max(1, round(rows / at_once / group)) * group
        # A larger batch hides a bubble, but is not what was asked for.
        return number if number * at_once <= LARGEST_BATCH * rows else None
    whole, rest = divmod(request.global_batch_size, at_once)
    return None if rest or whole % group else whole


def _grids(request: Request) -> Iterator[Parallel]:
    arch, world, node = request.arch, request.world_size, request.cluster.gpus_per_node
    tp_sizes = [n for n in _divisors(node) if _cuts(arch, n)]
    pp_sizes = [n for n in _divisors(world) if n <= min(MAX_PP_SIZE, arch.num_layers + 1)]
    cp_sizes = [n for n in (1, 2, 4, 8, 16) if n == 1 or request.seq_length // n >= 1024]
    ep_sizes = [n for n in _divisors(arch.num_experts) if n <= MAX_EXPERT_RANKS]
    experts = [(ep, etp) for ep in ep_sizes for etp in _etp_sizes(arch, ep, node)]
    for tp, pp, cp, (ep, etp) in itertools.product(tp_sizes, pp_sizes, cp_sizes, experts):
        if world % (tp * pp * cp) or world % (ep * etp * pp):
            continue
        if ep * etp < min(node, arch.num_experts):
            continue
        for vpp in (1, 2, 4):
            if vpp > 1 and (pp == 1 or pp * vpp > arch.num_layers + 1):
                continue
            yield Parallel(
                tp_size=tp, pp_size=pp, vpp_size=vpp, ep_size=ep, etp_size=etp, cp_size=cp,
                stages=_stages(arch, pp, vpp),
            )  # fmt: skip


def _etp_sizes(arch: Architecture, ep_size: int, gpus_per_node: int) -> list[int]:
    """Ways to cut each expert, within a node, where expert parallelism cannot do the same.

    ETP n with EP e holds as many weights as EP n * e. But each of the n ranks takes in the tokens
    of all of them, so it holds n times the experts' inputs, gathers them over NVLink on top of the
    same exchange, and multiplies by narrower matrices: larger and slower, always (a test compares
    pairs). So it is for more ranks than there are experts, or numbers that do not divide; the 671B
    with its 256 experts never asks for it.
    """
    most = MAX_EXPERT_RANKS // ep_size
    sizes = [n for n in _divisors(gpus_per_node) if n <= most and arch.moe_ffn_hidden_size % n == 0]
    finer = [n for n in sizes if n > 1 and arch.num_experts % (n * ep_size) == 0]
    return [size for size in sizes if all(size % n for n in finer)]


def _cuts(arch: Architecture, size: int) -> bool:
    return not Parallel(tp_size=size).problems(arch, size)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@functools.cache
def _stages(arch: Architecture, pp_size: int, vpp_size: int) -> str:
    """Balanced by cost, worked out once for all grids of these stages."""
    chunks = place(arch, Parallel(pp_size=pp_size, vpp_size=vpp_size))
    return "|".join(stage.letters for stage in chunks)
