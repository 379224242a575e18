"""Bytes of activations, counted: the stage's own forward and backward on the meta device.

One micro-batch goes through each chunk of a stage, under the recompute set in question, with
balanced routing times the stated imbalance. Counted is every storage that operations make, so what
autograd saves is counted once, and what is discarded to be computed again is not.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import (
    custom_backward,
    deallocate_output_tensor,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from megatron_dsv3.config.placement import Stage
from megatron_dsv3.model.gpt import DeepseekV3Model
from megatron_dsv3.model.router import PackedRow
from megatron_dsv3.plan.build import Built
from megatron_dsv3.plan.meter import Label, Meter
from megatron_dsv3.plan.offloading import HostMemory, copies, next_step
from megatron_dsv3.plan.ranks import META
from megatron_dsv3.plan.records import Workload

INPUT, FORWARD, BACKWARD = "input", "forward", "backward"
HELD = ("saved", "experts", "logits", "mtp")
"""Kinds of what is there between a micro-batch's forward and its backward."""
Bytes = Mapping[str, int]
"""By kind; those of `records.Activations`."""


@dataclass(frozen=True, slots=True)
class Counted:
    """One micro-batch in one chunk."""

    held: Bytes
    """Between its forward and its backward."""
    peak: Bytes
    """At its own peak, alone."""
    host: int
    """In host memory, between its forward and its backward."""
    left: int
    """After its backward, until the next forward: a dispatcher keeps its last probabilities, and
    with them what a layer that was computed again began with."""
    modules: Bytes
    """Of `held`, by the module that made it."""


def count(built: Built, workload: Workload) -> list[Counted]:
    """Every chunk of a rank, in virtual-pipeline order."""
    pairs = zip(built.stages, built.wrapped, built.chunks, strict=True)
    return [_count_chunk(*pair, workload, built.config) for pair in pairs]


def _count_chunk(
    stage: Stage, wrapped: nn.Module, chunk: DeepseekV3Model, workload: Workload, config: Any
) -> Counted:
    _balance(chunk, workload)
    run = partial(_run, stage, wrapped, chunk, workload, config)
    with copies() as host:
        counted = run(host)
        if not workload.memory.offload_activations:
            return counted
        # The first step offloads all; in others the last of each kind stays. What is held is that
        # of micro-batches whose backward is far, the peak that of the one whose backward is now.
        next_step()
        return replace(counted, peak=run(host).peak)


def _run(
    stage: Stage,
    wrapped: nn.Module,
    chunk: DeepseekV3Model,
    workload: Workload,
    config: Any,
    host: HostMemory,
) -> Counted:
    with Meter(chunk, _labels(chunk)) as meter:
        with meter.at(INPUT):
            batch = _batch(stage, workload, config)
        with meter.at(FORWARD):
            output = _forward(stage, wrapped, chunk, batch)
            shape, dtype, is_loss = output.shape, output.dtype, output.dim() == 0
            # What was sent on is dropped, as the pipeline's schedules do.
            deallocate_output_tensor(output, deallocate_pipeline_outputs=not is_loss)
        del batch
        held, modules, away = dict(meter.now), meter.modules(), host.num_bytes
        gradient = None if is_loss else torch.empty(shape, dtype=dtype, device=META)
        with meter.at(BACKWARD):
            custom_backward(output, gradient)
        del output, gradient
        chunk.set_input_tensor(None)
        left = sum(meter.now.values())
    return Counted(
        held=held, peak=_at_peak(meter.at_peak, held), host=away, left=left, modules=modules
    )


def _at_peak(peak: Bytes, held: Bytes) -> Bytes:
    """By kind, where what is gone before backward is working memory."""
    staying = {kind: min(peak.get(kind, 0), held.get(kind, 0)) for kind in HELD}
    made = {kind: peak.get(kind, 0) for kind in ("recomputed", "working")}
    made["working"] += sum(peak.values()) - sum(staying.values()) - sum(made.values())
    return staying | made


@dataclass(frozen=True, slots=True)
class _Batch:
    ids: Tensor
    labels: Tensor
    row: PackedRow
    arrived: Tensor | None
    """Hidden states of the stage before."""


def _batch(stage: Stage, workload: Workload, config: Any) -> _Batch:
    tokens, depths = workload.tokens_per_rank, 1 + workload.arch.num_mtp_layers
    arrived = None
    if not stage.has_embedding:
        local = tokens // (config.tensor_model_parallel_size if config.sequence_parallel else 1)
        shape = (local, 1, config.hidden_size)
        arrived = torch.empty(shape, dtype=config.params_dtype, device=META, requires_grad=True)
    return _Batch(
        ids=torch.empty(1, tokens, dtype=torch.int64, device=META),
        labels=torch.empty(depths, 1, tokens, dtype=torch.int64, device=META),
        row=_row(workload, depths),
        arrived=arrived,
    )


def _forward(stage: Stage, wrapped: nn.Module, chunk: DeepseekV3Model, batch: _Batch) -> Tensor:
    if batch.arrived is not None:
        chunk.set_input_tensor(batch.arrived)
    output: Tensor = wrapped(
        batch.ids, batch.ids, None, labels=batch.labels, packed_seq_params=batch.row
    )
    return output.float().sum() if stage.has_loss else output


def _row(workload: Workload, depths: int) -> PackedRow:
    """One row of equal documents."""
    tokens, cp_size = workload.tokens_per_rank, workload.parallel.cp_size
    length = workload.document_length or workload.seq_length
    whole = tokens * cp_size
    bounds = torch.tensor([*range(0, whole, length), whole], dtype=torch.int32, device="cpu")
    longest = max(stop - start for start, stop in pairwise(bounds.tolist()))
    return PackedRow(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        documents=torch.empty(depths, tokens, dtype=torch.int64, device=META),
        tokens_ahead=torch.empty(depths - 1, tokens, dtype=torch.int64, device=META),
        num_documents=len(bounds) - 1,
    )


def _balance(chunk: DeepseekV3Model, workload: Workload) -> None:
    """Tells the dispatchers how many tokens come, which they would read from the router's choice.

    Every expert of the busiest rank gets `imbalance` times its even share of all ranks' tokens.
    """
    for layer in chunk.modules():
        if isinstance(layer, MoELayer):
            layer.token_dispatcher.preprocess = partial(
                _preprocess, layer.token_dispatcher, imbalance=workload.imbalance
            )


def _preprocess(dispatcher: Any, routing_map: Tensor, *, imbalance: float) -> Tensor:
    """As `MoEAlltoAllTokenDispatcher.preprocess`, from shapes alone."""
    sent = routing_map.size(0) * dispatcher.config.moe_router_topk
    ep_size, etp_size = dispatcher.ep_size, dispatcher.tp_size
    received = round(sent * imbalance) if ep_size > 1 else sent
    dispatcher.num_out_tokens = sent
    dispatcher.input_splits = _even(sent, ep_size)
    dispatcher.output_splits = _even(received, ep_size)
    dispatcher.output_splits_tp = torch.tensor([received] * etp_size, device="cpu")
    chunks = torch.empty(etp_size * ep_size, dispatcher.num_local_experts, device=META)
    dispatcher.num_global_tokens_per_local_expert = chunks
    dispatcher.cuda_dtoh_point = "no_sync"
    whole = _even(received * etp_size, dispatcher.num_local_experts)
    return torch.tensor(whole, device="cpu")


def _even(total: int, parts: int) -> list[int]:
    share, rest = divmod(total, parts)
    return [share + (index < rest) for index in range(parts)]


def _labels(chunk: DeepseekV3Model) -> Label:
    """What an allocation of this chunk is counted as."""
    routed = [name for name, layer in chunk.named_modules() if isinstance(layer, MoELayer)]

    @functools.cache
    def label(module: str, phase: str) -> str:
        if phase == BACKWARD:
            return "recomputed" if module else "working"
        top = module.partition(".")[0]
        if phase == INPUT or top == "embedding":
            return "saved"
        if top != "decoder":
            return "mtp" if top == "mtp" else "logits"
        inside = next((name for name in routed if f"{module}.".startswith(f"{name}.")), None)
        if inside is None or module.startswith((f"{inside}.router", f"{inside}.shared_experts")):
            return "saved"
        return "experts"

    return label
