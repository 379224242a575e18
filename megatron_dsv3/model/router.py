"""Routing of DeepSeek-V3 (paper section 2.1.2), as transformers computes it, per document.

Differs from Megatron-Core's router: a group is scored by its best two experts whatever the top-k;
padding is left out of every statistic; the sequence-wise balance loss takes each packed document as
a sequence. Its value does not depend on the layout.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


@dataclass
class PackedRow(PackedSeqParams):
    """The packed documents of one row.

    It travels through the layers as `packed_seq_params`, so recomputation sees the right one.
    """

    documents: Tensor | None = None
    """[1 + num_mtp, this context-parallel rank's tokens], int64: the token's document; -1 on
    padding. At depth k also -1 on a document's last k tokens: what an MTP layer sees there is no
    token of the document."""
    tokens_ahead: Tensor | None = None
    """[num_mtp, this context-parallel rank's tokens], int64: the k-th next token of the document,
    which the k-th MTP layer embeds."""
    num_documents: int = 1
    """Documents in this row."""


class DeepseekV3Layer(TransformerLayer):
    """TransformerLayer that tells the router which document each token belongs to."""

    def forward(
        self, *args: Any, packed_seq_params: PackedSeqParams | None = None, **kwargs: Any
    ) -> Any:
        """As TransformerLayer; a `PackedRow`'s membership takes the place of `padding_mask`.

        Megatron's own `padding_mask` is one bool a token, is cut for sequence parallelism on the
        first stage only, and fails beside the expert bias.
        """
        membership = self._membership(packed_seq_params)
        if membership is not None:
            kwargs["padding_mask"] = membership
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)

    def _forward_attention(
        self, *args: Any, packed_seq_params: PackedSeqParams | None = None, **kwargs: Any
    ) -> Any:
        """As TransformerLayer; a schedule plan calls this and then `mlp.route`, not `forward`."""
        if self.config.overlap_moe_expert_parallel_comm and self.is_moe_layer:
            self.mlp.membership = self._membership(packed_seq_params)
        return super()._forward_attention(*args, packed_seq_params=packed_seq_params, **kwargs)

    def _membership(self, row: PackedSeqParams | None) -> Tensor | None:
        """[1, local tokens, documents], bool; a padding token belongs to none. None: no documents.

        Args:
            row: What travels through the layers.
        """
        if not isinstance(row, PackedRow) or row.documents is None:
            return None
        documents = row.documents[self.layer_number if self.is_mtp_layer else 0]
        if self.config.sequence_parallel:
            group = self.pg_collection.tp
            documents = documents.chunk(group.size())[group.rank()]
        indices = torch.arange(row.num_documents, device=documents.device)
        return (documents[:, None] == indices)[None]


class DeepseekV3Router(TopKRouter):
    """TopKRouter with DeepSeek-V3's choice of experts, statistics per document, and fp32 state.

    The two weights, the same for a whole step, make means over the documents and the real tokens of
    the global batch of this row's sums (of an MTP layer's too, which has a few tokens less).
    """

    balance_weight: float | Tensor = 1.0
    """1 over the documents of the global batch; a number or a scalar on the device."""
    token_weight: float | Tensor = 1.0
    """1 over the real tokens of the global batch, likewise."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Chooses experts.

        Args:
            logits: [seq, batch, experts], fp32.
            padding_mask: [seq, batch, documents], bool, the membership of `DeepseekV3Layer`; None:
                every row of the batch is one document without padding.

        Returns:
            Weights and choice, both [seq * batch, experts]; weights are zero where not chosen.
        """
        tokens = logits.flatten(0, 1)
        scores = None if self._is_fused() else tokens.float().sigmoid()
        probs, routing_map = self._by_kernel(tokens) if scores is None else self._choose(scores)
        if torch.is_grad_enabled():
            members = _members(logits, padding_mask)
            self._count(routing_map, members)
            if self.training and self.config.sequence_balance_coefficient:
                hits, shares = self._unbiased(tokens, scores)
                loss = self._balance_loss(shares, hits, members)
                probs = MoEAuxLossAutoScaler.apply(probs, loss)
            if self.training and self.config.moe_z_loss_coeff:
                probs = self._with_z_loss(probs, tokens, members)
        return probs, routing_map

    def _choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and choice [tokens, experts]."""
        experts = self._best_experts(scores.detach())
        weights = scores.gather(1, experts)
        if self.config.moe_router_normalize_topk:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * self.config.moe_router_topk_scaling_factor
        routing_map = torch.zeros_like(scores, dtype=torch.bool).scatter(1, experts, True)
        return torch.zeros_like(scores).scatter(1, experts, weights), routing_map

    def _by_kernel(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What `_choose` gives, by one kernel."""
        config = self.config
        chosen: tuple[Tensor, Tensor] = moe_utils.fused_topk_with_score_function(
            logits,
            self.topk,
            False,
            config.moe_router_num_groups if self._has_groups else None,
            config.moe_router_group_topk if self._has_groups else None,
            config.moe_router_topk_scaling_factor,
            "sigmoid",
            self.expert_bias,
        )
        return chosen

    @property
    def _has_groups(self) -> bool:
        return self.config.moe_router_num_groups > 1

    def _is_fused(self) -> bool:
        """Whether Transformer Engine's kernel knows this model's rule.

        It scores a group by its best `topk / group_topk` experts, and always normalises.
        """
        config = self.config
        groups_fit = not self._has_groups or self.topk == 2 * config.moe_router_group_topk
        return (
            config.moe_router_fusion
            and config.moe_router_normalize_topk
            and self.topk > 1
            and groups_fit
        )

    def _best_experts(self, scores: Tensor) -> Tensor:
        """Top-k experts [tokens, topk] within the best groups, by score plus bias."""
        biased = scores + self.expert_bias
        grouped = biased.unflatten(1, (self.config.moe_router_num_groups, -1))
        group_scores = grouped.topk(2, dim=-1).values.sum(-1)
        best = group_scores.topk(self.config.moe_router_group_topk, dim=-1, sorted=False).indices
        closed = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, best, False)
        open_scores = grouped.masked_fill(closed[..., None], -torch.inf).flatten(1)
        return open_scores.topk(self.topk, dim=-1, sorted=False).indices

    @torch.no_grad()
    def _count(self, routing_map: Tensor, members: Tensor) -> None:
        # Each launch costs the host more than the GPU: one product masks and sums.
        chosen = members.any(-1)[None].float() @ routing_map.float()
        self.local_tokens_per_expert += chosen[0]

    def _unbiased(self, logits: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        """Top-k of the scores alone, and each token's scores over their sum; [tokens, experts]."""
        if scores is None:
            of_kernel: tuple[Tensor, Tensor] = moe_utils.fused_compute_score_for_moe_aux_loss(
                logits, self.topk, "sigmoid"
            )
            return of_kernel
        top = scores.detach().topk(self.topk, dim=-1).indices
        hits = torch.zeros_like(scores, dtype=torch.bool).scatter(1, top, True)
        return hits, scores / (scores.sum(-1, keepdim=True) + 1e-20)

    def _balance_loss(self, shares: Tensor, hits: Tensor, members: Tensor) -> Tensor:
        """coefficient * mean over documents of sum_i f_i * P_i (paper eq. 17-20).

        f counts the unbiased top-k of the document's real tokens, P averages their normalised
        scores; both over the whole document, which tensor and context parallelism spread over
        ranks.
        """
        membership = members.float()
        share_sums = membership.T @ shares
        hits_per_document = membership.T @ hits.float()
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(hits_per_document, group=self.tp_cp_group)
        # A document's length is its hits over top-k; one of padding alone has none.
        lengths = hits_per_document.sum(1).clamp(min=self.topk) / self.topk
        per_document = (share_sums * hits_per_document).sum(1) / lengths.square()
        scale = self.config.sequence_balance_coefficient * self.num_experts / self.topk
        return per_document.sum() * (scale * self.balance_weight)

    def _with_z_loss(self, probs: Tensor, logits: Tensor, members: Tensor) -> Tensor:
        """Attaches coefficient * mean over real tokens of logsumexp(logits)^2."""
        squares = logits.float().logsumexp(-1).square() * members.any(-1)
        loss = self.config.moe_z_loss_coeff * squares.sum() * self.token_weight
        return MoEAuxLossAutoScaler.apply(probs, loss)

    def _apply(self, fn: Any, recurse: bool = True) -> "DeepseekV3Router":
        """Keeps bias and counters in fp32 through `.bfloat16()` and every other cast.

        256 biases around 5 keep 10 distinct values in bf16, and a bf16 counter stalls at 256.
        """
        before = {k: v for k, v in self._buffers.items() if v is not None and v.is_floating_point()}
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != value.dtype:
                self._buffers[name] = value.to(moved.device)
        return self


def _members(logits: Tensor, membership: Tensor | None) -> Tensor:
    """[seq * batch, documents], bool."""
    if membership is not None:
        return membership.flatten(0, 1)
    seq, batch = logits.shape[:2]
    return torch.eye(batch, dtype=torch.bool, device=logits.device).repeat(seq, 1)
