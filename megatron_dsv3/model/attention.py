"""Causal core attention in plain torch: MLA's head sizes, packed documents, context parallelism.

Layouts are Megatron-Core's: [seq, batch, heads, dim], or [tokens, heads, dim] for packed rows
("thd").
Under context parallelism a rank holds, of every document, chunk `r` and chunk `2 * cp - 1 - r` of
2 * cp equal ones ("zigzag"), which balances the causal work.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_dsv3.model.torch_modules import ExtraState


def zigzag(length: int, *, cp_rank: int, cp_size: int) -> Tensor:
    """Positions [length / cp_size] of a document that this context-parallel rank holds."""
    chunk, rest = divmod(length, 2 * cp_size)
    if rest:
        raise ValueError(
            f"document of {length} tokens cannot be cut for cp_size({cp_size}): its padded length "
            f"must be a multiple of 2 * cp_size = {2 * cp_size}"
        )
    low, high = cp_rank * chunk, (2 * cp_size - 1 - cp_rank) * chunk
    return torch.cat([torch.arange(low, low + chunk), torch.arange(high, high + chunk)])


class CoreAttention(ExtraState, nn.Module):
    """`TEDotProductAttention` for causal self-attention without dropout."""

    def __init__(
        self,
        config: TransformerConfig,
        *_: object,
        softmax_scale: float,
        pg_collection: Any,
        **__: object,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.fill_in_extra_state()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_: object,
        packed_seq_params: PackedSeqParams | None = None,
        **__: object,
    ) -> Tensor:
        """Returns [seq, batch, heads * dim], or [tokens, heads * dim] for packed rows."""
        if packed_seq_params is None:
            return self._attend(query, key, value).flatten(2)
        bounds = packed_seq_params.cu_seqlens_q.tolist()  # a host sync on a GPU; this is the CPU's
        share = self.cp_group.size() if self.cp_group else 1
        lengths = [(stop - start) // share for start, stop in pairwise(bounds)]
        rows = [tensor.unsqueeze(1).split(lengths) for tensor in (query, key, value)]
        documents = [self._attend(q, k, v) for q, k, v in zip(*rows, strict=True)]
        return torch.cat(documents).squeeze(1).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One document, or a batch of equally long ones: [seq, batch, heads, dim] each."""
        if self.cp_group is None:
            return self._softmax_product(query, key, value, mask=None)
        rank, size = self.cp_group.rank(), self.cp_group.size()
        length = query.size(0) * size
        positions = [zigzag(length, cp_rank=r, cp_size=size) for r in range(size)]
        gathered = [_AllGather.apply(t, self.cp_group).flatten(0, 1) for t in (key, value)]
        mask = positions[rank][:, None] >= torch.cat(positions)[None, :]
        return self._softmax_product(query, *gathered, mask=mask)

    def _softmax_product(
        self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None
    ) -> Tensor:
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        output = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale
        )
        return output.permute(2, 0, 1, 3)

    def sharded_state_dict(self, *_: object, **__: object) -> dict[str, Any]:
        """Nothing, as for `TEDotProductAttention`."""
        return {}


class _AllGather(torch.autograd.Function):
    """[n, ...] on every rank -> [ranks, n, ...]; the gradient is summed back to its owner."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        output = x.new_empty(group.size(), *x.shape)
        dist.all_gather_into_tensor(output.view(-1), x.contiguous().view(-1), group=group)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        output = grad.new_empty(grad.shape[1:])
        dist.reduce_scatter_tensor(output.view(-1), grad.contiguous().view(-1), group=ctx.group)
        return output, None
