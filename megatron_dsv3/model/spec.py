"""Layer specs of DeepSeek-V3 for either backend: Transformer Engine's modules, or plain torch."""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import multi_latent_attention as mla
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec_for_backend,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from megatron_dsv3.config.placement import Stage
from megatron_dsv3.model import torch_modules as torch_mods
from megatron_dsv3.model.attention import CoreAttention
from megatron_dsv3.model.config import DeepseekV3Config
from megatron_dsv3.model.moe import DeepseekV3MoELayer
from megatron_dsv3.model.mtp import DeepseekV3MTPLayer
from megatron_dsv3.model.router import DeepseekV3Layer, DeepseekV3Router, PackedRow


class TorchProvider(BackendSpecProvider):
    """The plain-torch counterpart of Megatron-Core's `TESpecProvider`."""

    def linear(self) -> type:
        """`TELinear`; MLA's down projections are its only users."""
        return torch_mods.DuplicatedLinear

    def column_parallel_linear(self) -> type:
        """`TEColumnParallelLinear`."""
        return torch_mods.ColumnLinear

    def row_parallel_linear(self) -> type:
        """`TERowParallelLinear`."""
        return torch_mods.RowLinear

    def fuse_layernorm_and_linear(self) -> bool:
        """Norms sit inside the linears that follow them."""
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        """`TELayerNormColumnParallelLinear`."""
        return torch_mods.NormColumnLinear

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> type:
        """`TENorm`."""
        return torch_mods.RMSNorm

    def core_attention(self) -> type:
        """`TEDotProductAttention`."""
        return CoreAttention

    def activation_func(self) -> None:
        """Megatron-Core's own SwiGLU."""

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        """`TEGroupedMLP`, which needs nothing of Transformer Engine but its two linears."""
        return partial(
            TEGroupedMLP,
            submodules=GroupedMLPSubmodules(
                linear_fc1=torch_mods.GroupedColumnLinear, linear_fc2=torch_mods.GroupedRowLinear
            ),
        )


class LatentAttention(mla.MLASelfAttention):
    """MLASelfAttention that follows transformers where Megatron-Core's configuration cannot."""

    def __init__(self, config: DeepseekV3Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.cp_size = config.context_parallel_size
        for name in ("linear_q_up_proj", "linear_kv_up_proj"):
            if hasattr(self, name):
                getattr(self, name).eps = config.latent_norm_epsilon
        if config.rope_type == "yarn" and not config.yarn_truncate:
            self.rotary_pos_emb.correction_range_round_to_int = False
            self.rotary_pos_emb.forward.cache_clear()
            self.rotary_pos_emb.max_seq_len_cached = 0  # what is cached was rounded
        if config.apply_rope_fusion:
            # Megatron-Core asks for angles in the activations' format, bf16; the kernels take fp32.
            self.rotary_pos_emb.get_cached_cos_sin = partial(
                _fp32_angles, self.rotary_pos_emb.get_cached_cos_sin
            )

    def _run_core_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        attn_mask_type: AttnMaskType | None = None,
        **extra: Any,
    ) -> Tensor:
        """Core attention on values as wide as they are, unpacked for a row of one document.

        Megatron-Core pads packed values to the width of the keys, 128 to 192. cuDNN takes them
        narrow: forward and backward of 4096 tokens 6.9 ms instead of 13.0 on an H100. Under
        context parallelism Transformer Engine's ring may need the padding, so it stays.
        """
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        if self._is_dense(packed_seq_params):
            rows = (tensor.unsqueeze(1) for tensor in (query, key, value))
            unpacked: Tensor = self.core_attention(
                *rows, attention_mask, attn_mask_type=mask_type, **extra
            )
            return unpacked.squeeze(1)
        run = self.core_attention if self.cp_size == 1 else super()._run_core_attention
        return run(
            query,
            key,
            value,
            attention_mask,
            packed_seq_params=packed_seq_params,
            attn_mask_type=mask_type,
            **extra,
        )

    def _is_dense(self, row: PackedSeqParams | None) -> bool:
        return (
            self.config.dense_single_documents
            and self.cp_size == 1
            and isinstance(row, PackedRow)
            and row.num_documents == 1
        )

    def _resolve_qk_norm_config(self, submodules: mla.MLASelfAttentionSubmodules) -> dict[str, Any]:
        """The spec's own classes.

        Megatron-Core would replace fused ones that it does not know by Transformer Engine's, and
        put a norm before a full-rank query projection, where DeepSeek has none.
        """
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
        norms = ("q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in (*names, *norms)}


def _fp32_angles(
    cached: Callable[..., tuple[Tensor, Tensor]], length: int, **options: Any
) -> tuple[Tensor, Tensor]:
    return cached(length, **{**options, "dtype": torch.float32})


class TorchLatentAttention(LatentAttention):
    """LatentAttention that takes the plain-torch classes of its spec as they are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The constructor asks for parallel_mode="duplicated" only of classes equal to TELinear.
        original, mla.TELinear = mla.TELinear, torch_mods.DuplicatedLinear
        try:
            super().__init__(*args, **kwargs)
        finally:
            mla.TELinear = original


class DenseMLP(MLP):
    """MLP with Transformer Engine's SwiGLU.

    Megatron-Core's is compiled, for any width once the shared experts come with another: its
    backward then took up to 1.5 ms for 4096 tokens of DeepSeek-V3's 18432, where memory needs 0.2
    (H200).
    """

    def __init__(
        self, config: DeepseekV3Config, submodules: MLPSubmodules, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        if config.fused_swiglu and submodules.activation_func is not None:
            self.config = copy(config)  # of this module alone: the experts' is weighted
            self.config.bias_activation_fusion = False
            self.config.use_te_activation_func = True
            self.activation_func = submodules.activation_func(config=self.config)


def block_specs(
    config: DeepseekV3Config, stage: Stage, *, transformer_engine: bool
) -> tuple[TransformerBlockSubmodules, MultiTokenPredictionBlockSubmodules | None]:
    """Specs of one chunk's decoder layers and, where it has any, its MTP layers."""
    backend = _transformer_engine_provider() if transformer_engine else TorchProvider()
    attention = LatentAttention if transformer_engine else TorchLatentAttention
    dense = _layer_spec(backend, attention, _dense_mlp(backend))
    sparse = _layer_spec(backend, attention, _sparse_mlp(backend), pre_mlp_norm=True)
    layers = [sparse if config.moe_layer_freq[layer] else dense for layer in stage.layers]
    decoder = TransformerBlockSubmodules(layer_specs=layers, layer_norm=backend.layer_norm())
    if not stage.mtp_layers:
        return decoder, None
    mtp_layer = get_mtp_layer_spec_for_backend(mtp_model_layer_spec=sparse, backend=backend)
    mtp_layer.module = DeepseekV3MTPLayer
    mtp = MultiTokenPredictionBlockSubmodules(layer_specs=[mtp_layer] * len(stage.mtp_layers))
    return decoder, mtp


def _transformer_engine_provider() -> BackendSpecProvider:
    # Imported here: the module needs Transformer Engine only when one of its classes is taken.
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def _layer_spec(
    backend: Any, attention: type, mlp: Any, *, pre_mlp_norm: bool = False
) -> ModuleSpec:
    """What get_gpt_layer_with_transformer_engine_spec gives for MLA, for any backend."""
    fused = backend.column_parallel_layer_norm_linear()
    attention_modules = mla.MLASelfAttentionSubmodules(
        linear_q_proj=backend.column_parallel_linear(),
        linear_q_down_proj=backend.linear(),
        linear_q_up_proj=fused,
        linear_kv_down_proj=backend.linear(),
        linear_kv_up_proj=fused,
        core_attention=backend.core_attention(),
        linear_proj=backend.row_parallel_linear(),
        q_layernorm=IdentityOp,  # fused into the up projections
        kv_layernorm=IdentityOp,
    )
    return ModuleSpec(
        module=DeepseekV3Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.layer_norm(),
            self_attention=ModuleSpec(
                module=attention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=attention_modules,
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.layer_norm() if pre_mlp_norm else IdentityOp,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _dense_mlp(backend: Any) -> Any:
    submodules = MLPSubmodules(
        linear_fc1=backend.column_parallel_layer_norm_linear(),
        linear_fc2=backend.row_parallel_linear(),
        activation_func=backend.activation_func(),
    )
    return partial(DenseMLP.as_mlp_submodule, submodules=submodules)


def _sparse_mlp(backend: Any) -> Any:
    shared = MLPSubmodules(
        linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear()
    )
    submodules = MoESubmodules(
        experts=backend.grouped_mlp_modules(True),
        shared_experts=partial(SharedExpertMLP, submodules=shared),
        router=DeepseekV3Router,
    )
    return partial(DeepseekV3MoELayer, submodules=submodules)
