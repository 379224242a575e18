"""What a card holds under ZeRO-3 with sequence parallelism: the arithmetic of the trainer replaced.

DeepSpeed's stage 3 spreads weights, gradients and AdamW's states over all ranks and gathers a layer
at a time; Ulysses-style sequence parallelism spreads a sequence over `sp_size` ranks; full
checkpointing keeps each layer's input. With offload, weights, gradients and states wait in host
memory. Experts are not dealt out: every rank gathers all of a layer's 256.
"""

from dataclasses import dataclass, replace

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.counts import count_parameters
from megatron_dsv3.plan.records import GIB

STATE_BYTES = 16
"""A parameter: bf16 weight and gradient, fp32 master and two moments."""
GATHERED_LAYERS = 1.1
"""Layers that are there whole: one, and what is prefetched of the next."""
UPDATE_GIB = 1e9 * 4 / GIB
"""fp32 gradients of DeepSpeed's sub-group of 10^9 parameters, where the update is on the GPU."""
CONTEXT_GIB = 2.0
"""CUDA, NCCL and buffers of gathering and scattering."""
LOGIT_BYTES = 6
"""A logit: bf16, and the fp32 copy that becomes its gradient."""
HIDDEN_COPIES = 2.0
"""Of a token's hidden state in the layer that is computed again: attention and residuals beside
what experts hold."""
GATHERED_HEADS = 3
"""Queries, keys, values and their gradients around the exchange of heads, in times of a query."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Zero3:
    """One row of such a trainer's table."""

    world_size: int
    sp_size: int
    batch_size: int
    """Sequences of a rank group."""
    seq_length: int = 32768
    offload: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Zero3Memory:
    """GiB of one card."""

    states: float
    gathered: float
    """Weights of a layer, whole."""
    kept: float
    """Inputs of all layers, for backward."""
    working: float
    """One layer computed again, with gradients; or the logits, if they are more."""

    @property
    def total(self) -> float:
        """At the peak."""
        return self.states + self.gathered + self.kept + self.working + CONTEXT_GIB


def zero3_memory(arch: Architecture, row: Zero3) -> Zero3Memory:
    """What one card holds."""
    counts = count_parameters(arch)
    one = replace(arch, num_layers=1, num_dense_layers=0, num_mtp_layers=0)
    unit = count_parameters(one)
    layer = unit.total - unit.embedding - unit.output
    tokens = row.batch_size * row.seq_length / row.sp_size
    hidden = 2.0 * tokens * arch.hidden_size
    states = STATE_BYTES * counts.total / row.world_size / GIB + UPDATE_GIB
    return Zero3Memory(
        states=0.0 if row.offload else states,
        gathered=2.0 * GATHERED_LAYERS * layer / GIB,
        kept=arch.num_layers * hidden / GIB,
        working=max(_layer(arch, tokens), _logits(arch, tokens)) / GIB,
    )


def _layer(arch: Architecture, tokens: float) -> float:
    """One expert layer computed again, and the gradients of what it holds."""
    width = arch.qk_head_dim + arch.qk_rope_head_dim
    heads = 2.0 * tokens * arch.num_heads * width * GATHERED_HEADS
    chosen = arch.num_experts_per_token + arch.num_shared_experts
    experts = 2.0 * tokens * chosen * (arch.hidden_size + 3 * arch.moe_ffn_hidden_size)
    return 2.0 * tokens * arch.hidden_size * HIDDEN_COPIES + max(heads, experts)


def _logits(arch: Architecture, tokens: float) -> float:
    return float(LOGIT_BYTES) * tokens * arch.vocab_size
