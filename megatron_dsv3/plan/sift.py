"""Memory of every stage by rules of thumb, in microseconds: rules out what cannot fit.

What is kept for backward is a table of tensors a token; the rest are states, in bytes a parameter.
A test holds the sums to the count of whole stages within 3%; what passes is looked at again with
counted units (`estimate`), and what is recommended is counted as a whole.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.placement import Stage, place
from megatron_dsv3.config.sections import MemorySection
from megatron_dsv3.plan.records import GIB, Activations, States, Workload
from megatron_dsv3.plan.schedule import in_flight_at_peak
from megatron_dsv3.plan.speed import stage_parameters
from megatron_dsv3.plan.states import FP8_COPIES, optimizer_bytes, update_bytes

FP8_COPY = 1 / 2 + 1 / 64
"""Of a bf16 input that FP8 keeps as bytes with a scale for 128."""
AGAIN = 2.1
"""Under full recompute a layer's tensors are there once more, with the gradients of the widest."""
AGAIN_EXPERTS = 0.6
"""The same where the experts alone are computed again."""
WORKING = 1.1
"""Else: gradients of a layer's widest tensors, over what it keeps without recomputation."""
WORKSPACES = int(0.3 * GIB)
"""cuBLAS's, and empty gradients that autograd is given."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """Kept for backward by one layer."""

    num_bytes: float
    is_input: bool
    """Of a product, which FP8 keeps in its own format."""
    again: frozenset[str] = frozenset()
    """Modules to recompute or offload that leave it out."""
    of_experts: bool = False


def stage_states(workload: Workload) -> list[States]:
    """Weights, gradients, masters and moments of one rank of each stage."""
    return [_states(workload, held.common, held.experts) for held in stage_parameters(workload)]


def stage_activations(workload: Workload) -> list[Activations]:
    """What comes and goes on one rank of each stage."""
    parallel = workload.parallel
    mine: list[list[Stage]] = [[] for _ in range(parallel.pp_size)]
    for stage in place(workload.arch, parallel):
        mine[stage.pp_rank].append(stage)
    layer = _layer(workload, moe=True)
    found = []
    for pp_rank, stages in enumerate(mine):
        chunks = [_held(workload, stage) for stage in stages]
        weights = [saved + experts for saved, experts in chunks]
        relative = tuple(round(weight / max(weights), 2) for weight in weights)
        counts = in_flight_at_peak(
            pp_rank,
            relative,
            pp_size=parallel.pp_size,
            vpp_size=parallel.vpp_size,
            num_micro_batches=workload.num_micro_batches,
            num_ahead=workload.num_ahead,
        )
        found.append(_activations(workload, stages, chunks, counts, layer))
    return found


def _states(workload: Workload, common: float, experts: float) -> States:
    parallel, optimizer = workload.parallel, workload.optimizer
    copies = parallel.dp_size(workload.world_size) * parallel.cp_size
    expert_copies = parallel.edp_size(workload.world_size)
    instances = parallel.num_optimizer_instances
    share = common * instances / copies + experts * instances / expert_copies
    each = optimizer_bytes(optimizer, workload.precision)
    gradient = 4 if optimizer.gradients == "fp32" else 2
    fp8 = workload.precision.fp8 != "off"
    copies = fp8 and not workload.precision.fp8_params
    return States(
        parameters=int(common + experts),
        # Of weights in FP8 alone there is one by rows and one by columns: two bytes as well.
        weights=int((common + experts) * 2),
        gradients=int((common + experts) * gradient),
        optimizer=int(share * each.gpu),
        optimizer_host=int(share * each.host),
        # Embedding and head are not products in FP8, so this is a little too much.
        caches=WORKSPACES + int((common + experts) * FP8_COPIES * copies),
        update=update_bytes(share, share, workload),
    )


def _activations(
    workload: Workload,
    stages: list[Stage],
    chunks: list[tuple[float, float]],
    counts: tuple[int, ...],
    layer: "_Layer",
) -> Activations:
    """`layer`: one with experts."""
    whole = layer.whole
    saved = sum(chunk[0] * count for chunk, count in zip(chunks, counts, strict=True))
    experts = sum(chunk[1] * count for chunk, count in zip(chunks, counts, strict=True))
    arch, tp_size = workload.arch, workload.parallel.tp_size
    has_loss = any(stage.has_loss for stage in stages)
    words = arch.vocab_size / tp_size
    depths = 1 + arch.num_mtp_layers
    # The first depth's logits wait as bf16 for the second's, whose loss is worked on in fp32.
    logits = has_loss * workload.tokens_per_rank * words * (2 * depths + 4)
    again, working = 0.0, WORKING * whole
    if workload.memory.recompute == "full":
        again, working = AGAIN * whole, 0.15 * whole
    elif workload.memory.recompute == "selective" and "moe" in workload.memory.recompute_modules:
        again = AGAIN_EXPERTS * whole
    # What backward needs next is back already, or has never been away.
    again += layer.away
    # Logits are gone when the first layer's backward begins: the larger of the two peaks.
    if has_loss:
        again, working = 0.0, max(WORKING * whole, again + working - logits)
    total = sum(first + second for first, second in chunks)
    held = sum((first + second) * n for (first, second), n in zip(chunks, counts, strict=True))
    away = sum(
        n * (sum(map(arch.is_moe_layer, stage.layers)) + len(stage.mtp_layers))
        for stage, n in zip(stages, counts, strict=True)
    )
    return Activations(
        saved=int(saved),
        experts=int(experts),
        recomputed=int(again),
        logits=int(logits),
        mtp=0,
        working=int(working),
        in_flight=held / total if total else 0.0,
        host=int(away * layer.away),
    )


@dataclass(frozen=True, slots=True)
class _Layer:
    """Bytes of one micro-batch in one layer."""

    plain: float
    """Kept for backward, without the experts' share."""
    experts: float
    """Kept for backward by the routed experts."""
    whole: float
    """What there would be without recomputation."""
    away: float = 0.0
    """In host memory until backward."""


def _held(workload: Workload, stage: Stage) -> tuple[float, float]:
    """Bytes of one micro-batch in one chunk: of all but the experts, of the experts."""
    arch = workload.arch
    of_moe = [arch.is_moe_layer(layer) for layer in stage.layers] + [True] * len(stage.mtp_layers)
    plain = len(stage.mtp_layers) * 4 * 2.0 * _share(workload) * arch.hidden_size
    experts = 0.0
    for moe in (False, True):
        if number := of_moe.count(moe):
            one = _layer(workload, moe=moe)
            plain, experts = plain + number * one.plain, experts + number * one.experts
    return plain, experts


def _layer(workload: Workload, *, moe: bool) -> _Layer:
    fp8 = workload.precision.fp8 != "off"
    return _summed(
        workload.arch,
        _share(workload),
        workload.imbalance,
        workload.parallel.etp_size,
        workload.memory,
        fp8=fp8,
        has_cp=workload.parallel.cp_size > 1,
        moe=moe,
    )


@functools.cache
def _summed(
    arch: Architecture,
    share: float,
    imbalance: float,
    etp_size: int,
    memory: MemorySection,
    *,
    fp8: bool,
    has_cp: bool,
    moe: bool,
) -> _Layer:
    # On the card neither is there when backward begins.
    again: set[str] = set(memory.offload_activations)
    again |= set(memory.recompute_modules if memory.recompute == "selective" else ())
    plain = experts = whole = away = 0.0
    for tensor in _tensors(arch, share, imbalance, etp_size, has_cp=has_cp, moe=moe):
        is_away = bool(tensor.again & set(memory.offload_activations))
        # What is offloaded is held as it is.
        size = tensor.num_bytes * (FP8_COPY if fp8 and tensor.is_input and not is_away else 1.0)
        whole += size
        away += size * is_away
        if tensor.again & again:
            continue
        plain += 0.0 if tensor.of_experts else size
        experts += size if tensor.of_experts else 0.0
    if memory.recompute == "full":
        return _Layer(2.0 * share * arch.hidden_size, 0.0, whole)
    return _Layer(plain, experts, whole, away)


def _share(workload: Workload) -> float:
    return workload.tokens_per_rank / workload.parallel.tp_size


def _tensors(
    arch: Architecture, share: float, imbalance: float, etp_size: int, *, has_cp: bool, moe: bool
) -> Iterator[Tensor]:
    """`share`: tokens of a rank over tensor-parallel ranks, which cut all of these tensors."""
    hidden = 2.0 * share * arch.hidden_size
    norms, up = frozenset({"layernorm"}), frozenset({"mla_up_proj"})
    yield Tensor(hidden, False)  # the layer's input, for its norm
    yield Tensor(hidden, True, norms)
    yield from _attention(arch, share, up, has_cp=has_cp)
    yield Tensor(hidden, False)  # between attention and feed-forward
    if moe:
        yield Tensor(hidden, True, norms | {"moe"})
        yield from _experts(arch, share, imbalance, etp_size)
        return
    mlp = frozenset({"mlp"})
    yield Tensor(hidden, True, mlp)
    yield Tensor(2.0 * share * 2 * arch.ffn_hidden_size, False, mlp)
    yield Tensor(2.0 * share * arch.ffn_hidden_size, True, mlp)


def _attention(
    arch: Architecture, share: float, up: frozenset[str], *, has_cp: bool
) -> Iterator[Tensor]:
    """By tokens and heads: tensor parallelism cuts the heads of all tokens, so `share` counts."""
    width = arch.qk_head_dim + arch.qk_rope_head_dim
    latents = 2.0 * share * ((arch.q_lora_rank or 0) + arch.kv_lora_rank)
    yield Tensor(latents, False)
    yield Tensor(latents, True, up)
    core = frozenset({"core_attn"})
    for size in (width, width) if has_cp else (width, width, arch.v_head_dim):
        yield Tensor(2.0 * share * arch.num_heads * size, False, up | core)
    # Context parallelism pads values to the width of keys, and cuts the result: copies of both.
    for _ in range(2 * has_cp):
        yield Tensor(2.0 * share * arch.num_heads * width, False, core)
    yield Tensor(2.0 * share * arch.num_heads * arch.v_head_dim, False)


def _experts(arch: Architecture, share: float, imbalance: float, etp_size: int) -> Iterator[Tensor]:
    """`etp_size` ranks cut the experts' width, and each takes in the tokens of all of them."""
    moe = frozenset({"moe"})
    sent = share * arch.num_experts_per_token * imbalance
    width = arch.moe_ffn_hidden_size
    first = moe | {"expert_fc1"}
    yield Tensor(2.0 * sent * etp_size * arch.hidden_size, True, first, of_experts=True)
    yield Tensor(2.0 * sent * 2 * width, False, moe, of_experts=True)
    yield Tensor(2.0 * sent * width, True, moe | {"moe_act"}, of_experts=True)
    shared = moe | {"shared_experts"}
    yield Tensor(2.0 * share * 2 * width * arch.num_shared_experts, False, shared)
    yield Tensor(2.0 * share * width * arch.num_shared_experts, True, shared)
    yield Tensor(4.0 * share * arch.num_experts * 3, False, moe)  # scores, probabilities, map
