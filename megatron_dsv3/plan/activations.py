"""Bytes of activations, counted: the stage's own forward and backward on the meta device.

One micro-batch goes through each chunk of a stage, under the recompute set in question, with
balanced routing times the stated imbalance. Counted is every storage that operations make, so what
autograd saves is counted once, and what is discarded to be computed again is not.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
from megatron_dsv3.plan.meter import Meter, Piece
from megatron_dsv3.plan.ranks import META
from megatron_dsv3.plan.records import Workload

FORWARD, BACKWARD = "forward", "backward"
KINDS = ("saved", "experts", "recomputed", "logits", "mtp", "working")
Bytes = Mapping[str, int]
"""By kind; those of `records.Activations`."""


@dataclass(frozen=True, slots=True)
class Counted:
    """One micro-batch in one chunk."""

    held: Bytes
    """Between its forward and its backward."""
    peak: Bytes
    """At its own peak, alone."""
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
    with Meter(chunk) as meter:
        meter.phase = FORWARD
        output = _forward(stage, wrapped, chunk, workload, config)
        shape, dtype, is_loss = output.shape, output.dtype, output.dim() == 0
        # What was sent on is dropped, as the pipeline's schedules do.
        deallocate_output_tensor(output, deallocate_pipeline_outputs=not is_loss)
        held = meter.pieces()
        meter.phase = BACKWARD
        gradient = None if is_loss else torch.empty(shape, dtype=dtype, device=META)
        custom_backward(output, gradient)
        del output, gradient
    kinds = _Kinds(chunk, held)
    modules: Counter[str] = Counter()
    for piece in held:
        modules[piece.module] += piece.size
    return Counted(held=kinds.sizes(held), peak=kinds.sizes(meter.at_peak), modules=dict(modules))


def _forward(
    stage: Stage, wrapped: nn.Module, chunk: DeepseekV3Model, workload: Workload, config: Any
) -> Tensor:
    tokens, depths = workload.tokens_per_rank, 1 + workload.arch.num_mtp_layers
    row = _row(workload, depths)
    if not stage.has_embedding:
        local = tokens // (config.tensor_model_parallel_size if config.sequence_parallel else 1)
        # The layers before the MTP layers hand on one hidden state, as do all others.
        shape = (local, 1, config.hidden_size)
        arrived = torch.empty(shape, dtype=config.params_dtype, device=META, requires_grad=True)
        chunk.set_input_tensor(arrived)
    ids = torch.empty(1, tokens, dtype=torch.int64, device=META)
    labels = torch.empty(depths, 1, tokens, dtype=torch.int64, device=META)
    output: Tensor = wrapped(ids, ids, None, labels=labels, packed_seq_params=row)
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


class _Kinds:
    """Tells what a piece is."""

    def __init__(self, chunk: DeepseekV3Model, held: Iterable[Piece]) -> None:
        self._held = {piece.number for piece in held}
        self._routed = [
            name for name, layer in chunk.named_modules() if isinstance(layer, MoELayer)
        ]

    def sizes(self, pieces: Iterable[Piece]) -> dict[str, int]:
        """Bytes by kind."""
        sizes = dict.fromkeys(KINDS, 0)
        for piece in pieces:
            sizes[self._kind(piece)] += piece.size
        return sizes

    def _kind(self, piece: Piece) -> str:
        if piece.phase == BACKWARD:
            return "recomputed" if piece.module else "working"
        if piece.number not in self._held:
            return "working"
        top = piece.module.partition(".")[0]
        if top not in ("decoder", "embedding"):
            return "mtp" if top == "mtp" else "logits"
        return "experts" if self._is_routed(piece.module) else "saved"

    def _is_routed(self, module: str) -> bool:
        for layer in self._routed:
            if module == layer or module.startswith(f"{layer}."):
                return not module.startswith((f"{layer}.router", f"{layer}.shared_experts"))
        return False
