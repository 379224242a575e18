"""Which Hugging Face tensors make up each Megatron-Core parameter, and how it is sharded.

This table is the only place in the package that knows both name spaces. The online load, the
export, the offline converter, the verifier and the planner walk `expand(arch)`; adding a kind of
parameter means adding one row.

Layout: a row's names are relative to its stack's prefixes (`decoder.layers.3.`, `model.layers.3.`).
Several HF names on one row mean that Megatron stores those tensors joined along dim 0, in that
order. Megatron's names are those of Transformer Engine's modules, where a norm is fused into the
linear that follows it.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from megatron_dsv3.config.architecture import Architecture

Shape = tuple[int, ...]


class Shard(Enum):
    """How tensor parallelism splits a parameter; the value is the split dim."""

    NONE = None
    """The same tensor on every rank."""
    COLUMN = 0
    """Output features."""
    ROW = 1
    """Input features."""


class In(Enum):
    """Which layers carry a row."""

    MODEL = "model"
    EVERY_LAYER = "every layer"
    DENSE_LAYER = "dense layer"
    MOE_LAYER = "mixture-of-experts layer"
    MTP = "what surrounds the layer inside an MTP block"


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of parameter. `{e}` in a name is an expert index."""

    where: In
    mcore: str
    hf: tuple[str, ...]
    shard: Shard
    shape: Callable[[Architecture], Shape | None]
    """Shape of each HF tensor; None: this architecture has no such parameter."""
    quantised: bool = False
    """Whether DeepSeek's FP8 checkpoints store it in e4m3 blocks with a `weight_scale_inv`."""
    is_buffer: bool = False
    """A buffer of the live module, no parameter; fp32 in every format and on every boundary."""


@dataclass(frozen=True, slots=True)
class Param:
    """One row with layer and expert filled in: a parameter of the whole, unsharded model."""

    mcore: str
    hf: tuple[str, ...]
    shard: Shard
    hf_shape: Shape
    """Shape of each HF tensor."""
    quantised: bool
    is_buffer: bool
    layer: int | None
    """Global decoder layer; None: outside the decoder's layers."""
    mtp_depth: int | None
    """Global MTP block; None: not in one."""
    expert: int | None
    """Global routed expert; None: not of one."""

    @property
    def is_expert(self) -> bool:
        """Whether the expert-parallel and expert-tensor-parallel groups shard it, instead of TP."""
        return self.expert is not None

    @property
    def mcore_shape(self) -> Shape:
        """Shape of the unsharded Megatron parameter."""
        return (len(self.hf) * self.hf_shape[0], *self.hf_shape[1:])

    @property
    def numel(self) -> int:
        """Elements of the unsharded Megatron parameter."""
        return math.prod(self.mcore_shape)


def _hidden(a: Architecture) -> Shape:
    return (a.hidden_size,)


def _vocabulary(a: Architecture) -> Shape:
    return (a.vocab_size, a.hidden_size)


def _dim_q(a: Architecture) -> int:
    return a.num_heads * (a.qk_head_dim + a.qk_rope_head_dim)


def _dim_kv(a: Architecture) -> int:
    return a.num_heads * (a.qk_head_dim + a.v_head_dim)


def _dim_shared(a: Architecture) -> int:
    return a.num_shared_experts * a.moe_ffn_hidden_size


N, C, R = Shard.NONE, Shard.COLUMN, Shard.ROW
# Named, because the copies below point to them.
HF_EMBEDDING, HF_HEAD = "model.embed_tokens.weight", "lm_head.weight"
MCORE_EMBEDDING, MCORE_HEAD = "embedding.word_embeddings.weight", "output_layer.weight"

# fmt: off
TABLE: tuple[Row, ...] = (
    # Nothing pads the vocabulary: Megatron-Core leaves that to its caller, and we never do it.
    Row(In.MODEL, MCORE_EMBEDDING,
        (HF_EMBEDDING,), C, _vocabulary),
    Row(In.MODEL, "decoder.final_layernorm.weight",
        ("model.norm.weight",), N, _hidden),
    Row(In.MODEL, MCORE_HEAD,
        (HF_HEAD,), C, lambda a: None if a.tie_embeddings else _vocabulary(a)),

    # Multi-head latent attention; norms of compressed vectors are fused into what follows them.
    Row(In.EVERY_LAYER, "input_layernorm.weight",
        ("input_layernorm.weight",), N, _hidden),
    Row(In.EVERY_LAYER, "self_attention.linear_q_proj.weight",
        ("self_attn.q_proj.weight",),
        C, lambda a: None if a.q_lora_rank else (_dim_q(a), a.hidden_size), quantised=True),
    Row(In.EVERY_LAYER, "self_attention.linear_q_down_proj.weight",
        ("self_attn.q_a_proj.weight",),
        N, lambda a: (a.q_lora_rank, a.hidden_size) if a.q_lora_rank else None, quantised=True),
    Row(In.EVERY_LAYER, "self_attention.linear_q_up_proj.layer_norm_weight",
        ("self_attn.q_a_layernorm.weight",),
        N, lambda a: (a.q_lora_rank,) if a.q_lora_rank else None),
    Row(In.EVERY_LAYER, "self_attention.linear_q_up_proj.weight",
        ("self_attn.q_b_proj.weight",),
        C, lambda a: (_dim_q(a), a.q_lora_rank) if a.q_lora_rank else None, quantised=True),
    Row(In.EVERY_LAYER, "self_attention.linear_kv_down_proj.weight",
        ("self_attn.kv_a_proj_with_mqa.weight",),
        N, lambda a: (a.kv_lora_rank + a.qk_rope_head_dim, a.hidden_size), quantised=True),
    Row(In.EVERY_LAYER, "self_attention.linear_kv_up_proj.layer_norm_weight",
        ("self_attn.kv_a_layernorm.weight",), N, lambda a: (a.kv_lora_rank,)),
    Row(In.EVERY_LAYER, "self_attention.linear_kv_up_proj.weight",
        ("self_attn.kv_b_proj.weight",),
        C, lambda a: (_dim_kv(a), a.kv_lora_rank), quantised=True),
    Row(In.EVERY_LAYER, "self_attention.linear_proj.weight",
        ("self_attn.o_proj.weight",),
        R, lambda a: (a.hidden_size, a.num_heads * a.v_head_dim), quantised=True),

    # Dense feed-forward; its norm is fused into linear_fc1.
    Row(In.DENSE_LAYER, "mlp.linear_fc1.layer_norm_weight",
        ("post_attention_layernorm.weight",), N, _hidden),
    Row(In.DENSE_LAYER, "mlp.linear_fc1.weight",
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        C, lambda a: (a.ffn_hidden_size, a.hidden_size), quantised=True),
    Row(In.DENSE_LAYER, "mlp.linear_fc2.weight",
        ("mlp.down_proj.weight",),
        R, lambda a: (a.hidden_size, a.ffn_hidden_size), quantised=True),

    # Mixture of experts; its norm stands apart, because router and experts both read its output.
    Row(In.MOE_LAYER, "pre_mlp_layernorm.weight",
        ("post_attention_layernorm.weight",), N, _hidden),
    Row(In.MOE_LAYER, "mlp.router.weight",
        ("mlp.gate.weight",), N, lambda a: (a.num_experts, a.hidden_size)),
    Row(In.MOE_LAYER, "mlp.router.expert_bias",
        ("mlp.gate.e_score_correction_bias",), N, lambda a: (a.num_experts,), is_buffer=True),
    Row(In.MOE_LAYER, "mlp.shared_experts.linear_fc1.weight",
        ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
        C, lambda a: (_dim_shared(a), a.hidden_size), quantised=True),
    Row(In.MOE_LAYER, "mlp.shared_experts.linear_fc2.weight",
        ("mlp.shared_experts.down_proj.weight",),
        R, lambda a: (a.hidden_size, _dim_shared(a)), quantised=True),
    Row(In.MOE_LAYER, "mlp.experts.linear_fc1.weight{e}",
        ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
        C, lambda a: (a.moe_ffn_hidden_size, a.hidden_size), quantised=True),
    Row(In.MOE_LAYER, "mlp.experts.linear_fc2.weight{e}",
        ("mlp.experts.{e}.down_proj.weight",),
        R, lambda a: (a.hidden_size, a.moe_ffn_hidden_size), quantised=True),

    # Multi-token prediction: what surrounds the inner layer.
    Row(In.MTP, "enorm.weight", ("enorm.weight",), N, _hidden),
    Row(In.MTP, "hnorm.weight", ("hnorm.weight",), N, _hidden),
    Row(In.MTP, "eh_proj.weight",
        ("eh_proj.weight",), C, lambda a: (a.hidden_size, 2 * a.hidden_size)),
    Row(In.MTP, "final_layernorm.weight",
        ("shared_head.norm.weight",), N, _hidden),
)
# fmt: on


@dataclass(frozen=True, slots=True)
class _Stack:
    """A place in the model: the rows it takes and what goes before their names."""

    rows: frozenset[In]
    mcore: str = ""
    hf: str = ""
    layer: int | None = None
    mtp_depth: int | None = None


def expand(arch: Architecture) -> Iterator[Param]:
    """Every parameter of the whole, unsharded model, in model order (MTP last)."""
    shapes = [(row, shape) for row in TABLE if (shape := row.shape(arch)) is not None]
    for stack in _stacks(arch):
        for row, shape in shapes:
            if row.where in stack.rows:
                yield from _params(row, shape, stack, arch.num_experts)


def _stacks(arch: Architecture) -> Iterator[_Stack]:
    yield _Stack(frozenset({In.MODEL}))
    for layer in range(arch.num_layers):
        kind = In.MOE_LAYER if arch.is_moe_layer(layer) else In.DENSE_LAYER
        rows = frozenset({In.EVERY_LAYER, kind})
        yield _Stack(rows, f"decoder.layers.{layer}.", f"model.layers.{layer}.", layer=layer)
    for depth in range(arch.num_mtp_layers):
        # Hugging Face counts MTP blocks on from the decoder's layers and has no name for what is
        # inside of them.
        mcore, hf = f"mtp.layers.{depth}.", f"model.layers.{arch.num_layers + depth}."
        yield _Stack(frozenset({In.MTP}), mcore, hf, mtp_depth=depth)
        rows = frozenset({In.EVERY_LAYER, In.MOE_LAYER})
        yield _Stack(rows, f"{mcore}mtp_model_layer.", hf, mtp_depth=depth)


def _params(row: Row, shape: Shape, stack: _Stack, num_experts: int) -> Iterator[Param]:
    experts = range(num_experts) if "{e}" in row.mcore else (None,)
    for expert in experts:
        yield Param(
            mcore=stack.mcore + row.mcore.format(e=expert),
            hf=tuple([stack.hf + name.format(e=expert) for name in row.hf]),
            shard=row.shard,
            hf_shape=shape,
            quantised=row.quantised,
            is_buffer=row.is_buffer,
            layer=stack.layer,
            mtp_depth=stack.mtp_depth,
            expert=expert,
        )


def by_mcore_name(arch: Architecture) -> dict[str, Param]:
    """The parameter under each global Megatron name."""
    return {param.mcore: param for param in expand(arch)}


def by_hf_name(arch: Architecture) -> dict[str, Param]:
    """The parameter that each HF tensor is (a part of); copies are not among them."""
    return {name: param for param in expand(arch) for name in param.hf}


def hf_copies(arch: Architecture) -> dict[str, str]:
    """HF tensors that only repeat another one, optional on load: {copy: original}."""
    return exported_copies(arch) | ({HF_HEAD: HF_EMBEDDING} if arch.tie_embeddings else {})


def exported_copies(arch: Architecture) -> dict[str, str]:
    """The copies that an export writes: the MTP blocks', without which vLLM's MTP guesses nothing.

    A tied `lm_head.weight` is not written, as transformers does not write it.
    """
    copies = {}
    for depth in range(arch.num_mtp_layers):
        block = f"model.layers.{arch.num_layers + depth}."
        copies[f"{block}embed_tokens.weight"] = HF_EMBEDDING
        copies[f"{block}shared_head.head.weight"] = HF_EMBEDDING if arch.tie_embeddings else HF_HEAD
    return copies


def mcore_copies(arch: Architecture) -> dict[str, str]:
    """Parameters of a live model that only repeat another one: {copy: original}.

    With tied embeddings, a last pipeline stage that is not also the first holds the embedding once
    more as its output layer.
    """
    return {MCORE_HEAD: MCORE_EMBEDDING} if arch.tie_embeddings else {}


_LAYER = re.compile(r"^decoder\.layers\.(\d+)(?=\.)")
_EXPERT = re.compile(r"(?<=\.mlp\.experts\.linear_fc[12]\.weight)(\d+)$")


def global_name(local_name: str, *, layers: Sequence[int], expert_offset: int) -> str:
    """The table's name of a parameter of one chunk, whose decoder layers and experts count from 0.

    MTP blocks have their global numbers on whichever stage they are.

    Args:
        local_name: Name inside the unwrapped `GPTModel`.
        layers: Global decoder layers of this chunk, in its order.
        expert_offset: Global index of this rank's first routed expert.
    """
    name = _LAYER.sub(lambda m: f"decoder.layers.{layers[int(m[1])]}", local_name)
    return _EXPERT.sub(lambda m: str(int(m[1]) + expert_offset), name)


def local_name(
    global_name: str, *, layers: Sequence[int], expert_offset: int, num_local_experts: int
) -> str | None:
    """Undoes `global_name`; None: another chunk or expert-parallel rank holds the parameter."""
    if (layer := _LAYER.search(global_name)) and int(layer[1]) not in layers:
        return None
    expert = _EXPERT.search(global_name)
    if expert and not 0 <= int(expert[1]) - expert_offset < num_local_experts:
        return None
    name = _LAYER.sub(lambda m: f"decoder.layers.{layers.index(int(m[1]))}", global_name)
    return _EXPERT.sub(lambda m: str(int(m[1]) - expert_offset), name)
