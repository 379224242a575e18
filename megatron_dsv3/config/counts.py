"""Parameters and FLOPs of a DeepSeek-V3, in closed form from its architecture."""

from dataclasses import dataclass

from megatron_dsv3.config.architecture import Architecture

CHECKPOINT_STATE_BYTES = 12
"""A parameter's in a checkpoint besides its weight: master and two moments, fp32 whatever they are
in memory."""
OFFLOADED_STATE_BYTES = 16
"""A parameter's in host memory, with `optimizer.offload_fraction`: these, and its gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCounts:
    """Trained parameters by kind; the experts' bias is a buffer and no part of any of them."""

    embedding: int
    output: int
    """The head; 0 where it is tied to the embedding."""
    attention: int
    """Projections of the decoder's attention."""
    dense_mlp: int
    router: int
    shared_experts: int
    routed_experts: int
    active_routed_experts: int
    """Of `routed_experts`, those of the experts that one token is sent to."""
    norms: int
    mtp: int
    """All MTP layers, without the copies of embedding and head that their files hold."""

    @property
    def total(self) -> int:
        """All parameters of the model without MTP."""
        kinds = (self.embedding, self.output, self.attention, self.dense_mlp, self.router)
        return sum(kinds) + self.shared_experts + self.routed_experts + self.norms

    @property
    def active(self) -> int:
        """Parameters used for one token, without MTP.

        The embedding counts whole, as in the 37B of the paper, though a token reads one row of it.
        """
        return self.total - self.routed_experts + self.active_routed_experts


def count_parameters(arch: Architecture) -> ParameterCounts:
    """Counts the parameters of this model."""
    vocabulary = arch.vocab_size * arch.hidden_size
    routed = arch.num_moe_layers * _expert(arch)
    return ParameterCounts(
        embedding=vocabulary,
        output=0 if arch.tie_embeddings else vocabulary,
        attention=arch.num_layers * _attention(arch),
        dense_mlp=arch.num_dense_layers * _dense_mlp(arch),
        router=arch.num_moe_layers * _router(arch),
        shared_experts=routed * arch.num_shared_experts,
        routed_experts=routed * arch.num_experts,
        active_routed_experts=routed * arch.num_experts_per_token,
        norms=arch.num_layers * _layer_norms(arch) + arch.hidden_size,
        mtp=arch.num_mtp_layers * _mtp_layer(arch),
    )


def flops_per_token(
    arch: Architecture, seq_length: int, *, num_mtp_layers: int | None = None
) -> int:
    """Model FLOPs of forward and backward for one token, averaged over a causal sequence.

        6 * weights + 3 * layers * heads * (qk_head_dim + qk_rope_head_dim + v_head_dim) * (s + 1)

    `weights` are those that multiply a token: attention, dense MLPs, router, shared and chosen
    experts, the head; of an MTP layer its projection, its block and the head once more. A weight
    costs one multiply-add forward and two backward. A token attends to itself and those before it,
    (s + 1) / 2 of a sequence of s on average, and for each a head multiplies a query with a key and
    a probability with a value. Norms, softmax, rotary embedding, the embedding's look-up and all
    recomputation count nothing, as is usual for MFU.

    Args:
        arch: The model.
        seq_length: Tokens of a sequence, s; for packed rows, of a document.
        num_mtp_layers: MTP layers that are computed; None: all of the model.
    """
    depth = arch.num_mtp_layers if num_mtp_layers is None else num_mtp_layers
    unit = unit_flops(arch, seq_length)
    layers = arch.num_dense_layers * unit.dense_layer + arch.num_moe_layers * unit.moe_layer
    return layers + depth * unit.mtp_layer + (1 + depth) * unit.head


def document_flops(arch: Architecture, *, num_tokens: int, num_squares: int) -> int:
    """Model FLOPs of forward and backward for whole documents of any lengths.

    `flops_per_token` grows linearly with the length, so two sums say all of the lengths.

    Args:
        arch: The model.
        num_tokens: Of all documents.
        num_squares: Squares of the documents' tokens, summed.
    """
    alone = flops_per_token(arch, 0)
    return num_tokens * alone + num_squares * (flops_per_token(arch, 1) - alone)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFlops:
    """`flops_per_token` by the units that pipeline stages are made of."""

    dense_layer: int
    moe_layer: int
    mtp_layer: int
    """Without its pass through the head."""
    head: int
    """One pass; every prediction depth has one."""


def unit_flops(arch: Architecture, seq_length: int) -> UnitFlops:
    """Forward and backward FLOPs of one token in one unit; see `flops_per_token`."""
    head_dims = arch.qk_head_dim + arch.qk_rope_head_dim + arch.v_head_dim
    products = 3 * arch.num_heads * head_dims * (seq_length + 1)
    chosen = arch.num_experts_per_token + arch.num_shared_experts
    moe_weights = _attention(arch) + _router(arch) + chosen * _expert(arch)
    moe_layer = 6 * moe_weights + products
    return UnitFlops(
        dense_layer=6 * (_attention(arch) + _dense_mlp(arch)) + products,
        moe_layer=moe_layer,
        mtp_layer=moe_layer + 6 * _mtp_projection(arch),
        head=6 * arch.vocab_size * arch.hidden_size,
    )


def _attention(arch: Architecture) -> int:
    """Projections of one layer's attention."""
    q_dim = arch.num_heads * (arch.qk_head_dim + arch.qk_rope_head_dim)
    kv_dim = arch.num_heads * (arch.qk_head_dim + arch.v_head_dim)
    rank = arch.q_lora_rank
    query = arch.hidden_size * q_dim if rank is None else rank * (arch.hidden_size + q_dim)
    down = arch.hidden_size * (arch.kv_lora_rank + arch.qk_rope_head_dim)
    output = arch.num_heads * arch.v_head_dim * arch.hidden_size
    return query + down + arch.kv_lora_rank * kv_dim + output


def host_bytes_of_a_save(
    arch: Architecture, *, weight_bytes: int = 2, offload_fraction: float, asynchronous: bool
) -> float:
    """Of a parameter, until the files are written, over all that is there anyway.

    What is on GPUs comes to pinned memory, which torch allocates in powers of two; that is counted
    for the matrices of an expert, of which nearly all of the model consists. What lives on the host
    is there a second time where training goes on and changes it.
    """
    matrix = arch.moe_ffn_hidden_size * arch.hidden_size
    pinned = (1 << (matrix - 1).bit_length()) / matrix
    on_host = CHECKPOINT_STATE_BYTES * offload_fraction
    on_gpu = weight_bytes + CHECKPOINT_STATE_BYTES - on_host
    return pinned * on_gpu + (on_host if asynchronous else 0.0)


def _dense_mlp(arch: Architecture) -> int:
    return 3 * arch.hidden_size * arch.ffn_hidden_size


def _router(arch: Architecture) -> int:
    return arch.hidden_size * arch.num_experts


def _expert(arch: Architecture) -> int:
    """One expert, routed or shared: gate, up and down projection."""
    return 3 * arch.hidden_size * arch.moe_ffn_hidden_size


def _layer_norms(arch: Architecture) -> int:
    """Norms of one layer: before attention and feed-forward, and of the latents."""
    return 2 * arch.hidden_size + (arch.q_lora_rank or 0) + arch.kv_lora_rank


def _mtp_projection(arch: Architecture) -> int:
    """From embedding and hidden state, side by side, to the block's input."""
    return 2 * arch.hidden_size * arch.hidden_size


def _mtp_layer(arch: Architecture) -> int:
    norms = 3 * arch.hidden_size  # of embedding, hidden state and output
    experts = (arch.num_experts + arch.num_shared_experts) * _expert(arch)
    block = _attention(arch) + _router(arch) + experts + _layer_norms(arch)
    return norms + _mtp_projection(arch) + block
