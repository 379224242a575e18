"""Architecture + layout -> Megatron-Core's transformer configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_dsv3.config.architecture import Architecture, Yarn
from megatron_dsv3.config.kernels import KernelsSection
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.placement import mcore_layout, place
from megatron_dsv3.config.sections import ExpertsSection, MemorySection, PrecisionSection


@dataclass
class DeepseekV3Config(MLATransformerConfig):
    """MLATransformerConfig and what it has no words for."""

    moe_router_normalize_topk: bool = True
    """Divide the chosen experts' scores by their sum."""
    sequence_balance_coefficient: float = 0.0
    """Weight of the sequence-wise balance loss (paper eq. 17)."""
    latent_norm_epsilon: float = 1e-6
    """Of the two latent norms: transformers' modules do not follow rms_norm_eps there."""
    yarn_truncate: bool = True
    """Round YaRN's bounds to whole dimensions."""
    dense_single_documents: bool = False
    """Attention of a row of one document is that of an unpacked row."""
    fused_swiglu: bool = False
    """The dense layers' SwiGLU is Transformer Engine's."""
    fused_update: bool = False
    """The optimizer clips and updates by one kernel."""


def mcore_config(
    arch: Architecture,
    parallel: Parallel,
    *,
    dtype: torch.dtype,
    device: torch.device,
    experts: ExpertsSection = ExpertsSection(),
    memory: MemorySection = MemorySection(),
    precision: PrecisionSection = PrecisionSection(),
    kernels: KernelsSection = KernelsSection(),
    options: Mapping[str, Any] | None = None,
) -> DeepseekV3Config:
    """The configuration of every rank of this layout.

    Args:
        arch: The model.
        parallel: The layout.
        dtype: Of parameters and activations: float32 or bfloat16.
        device: Where the model will be; a GPU's fused kernels are taken there.
        experts: Losses of the routers, and how tokens are sent.
        memory: What is recomputed or offloaded.
        precision: Which products are computed in FP8; `dtype` is of all others.
        kernels: Which of a GPU's faster kernels are taken.
        options: More fields of Megatron-Core's configuration, where they change no numbers.
    """
    values = {
        **_sizes(arch),
        **_attention(arch),
        **_experts(arch),
        **_layout(arch, parallel),
        **_numerics(dtype),
        **_device(device, dtype, kernels, has_yarn=arch.yarn is not None),
        **_memory(memory),
        **_fp8(precision),
        "sequence_balance_coefficient": experts.aux_loss_coefficient,
        "moe_z_loss_coeff": experts.z_loss_coefficient or None,
        "moe_token_dispatcher_type": experts.dispatcher,
        "overlap_moe_expert_parallel_comm": experts.overlap_all_to_all,
        **(options or {}),
    }
    return DeepseekV3Config(**values)


def _sizes(arch: Architecture) -> dict[str, Any]:
    return {
        "num_layers": arch.num_layers,
        "mtp_num_layers": arch.num_mtp_layers or None,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_heads,
        "kv_channels": arch.v_head_dim,
        "layernorm_epsilon": arch.rms_norm_eps,
        "init_method_std": arch.initializer_range,
    }


def _attention(arch: Architecture) -> dict[str, Any]:
    plain = {"rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale": 1.0}
    return {
        "q_lora_rank": arch.q_lora_rank,
        "kv_lora_rank": arch.kv_lora_rank,
        "qk_head_dim": arch.qk_head_dim,
        "qk_pos_emb_head_dim": arch.qk_rope_head_dim,
        "v_head_dim": arch.v_head_dim,
        "qk_layernorm": True,
        "rotary_base": arch.rope_theta,
        **(plain if arch.yarn is None else _yarn(arch.yarn)),
    }


def _yarn(yarn: Yarn) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mcore_mscale,
        "mscale_all_dim": yarn.mscale_all_dim or 0.0,
        "yarn_truncate": yarn.truncate,
    }


def _experts(arch: Architecture) -> dict[str, Any]:
    return {
        "num_moe_experts": arch.num_experts,
        "moe_layer_freq": [int(arch.is_moe_layer(layer)) for layer in range(arch.num_layers)],
        "moe_ffn_hidden_size": arch.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": arch.num_shared_experts * arch.moe_ffn_hidden_size,
        "moe_router_topk": arch.num_experts_per_token,
        "moe_router_num_groups": arch.num_groups,
        "moe_router_group_topk": arch.num_groups_per_token,
        "moe_router_topk_scaling_factor": arch.routed_scaling_factor,
        "moe_router_normalize_topk": arch.normalize_topk,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
        # The router brings its own balance loss, which knows documents and padding.
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": True,
    }


def _memory(memory: MemorySection) -> dict[str, Any]:
    recompute: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {
            "recompute_granularity": "selective",
            "recompute_modules": list(memory.recompute_modules),
        },
        "full": {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    }
    offload: dict[str, Any] = {}
    if memory.offload_activations:
        offload = {
            "fine_grained_activation_offloading": True,
            "offload_modules": list(memory.offload_activations),
        }
    return recompute[memory.recompute] | offload


def _fp8(precision: PrecisionSection) -> dict[str, Any]:
    if precision.fp8 == "off":
        return {}
    first, last = precision.bf16_first_layers, precision.bf16_last_layers
    return {
        # Gradients of one scale a tensor need e5m2's range; blocks do without it.
        "fp8": "hybrid" if precision.fp8 == "tensorwise" else "e4m3",
        "fp8_recipe": precision.fp8,
        "fp8_param": precision.fp8_params,
        "first_last_layers_bf16": first + last > 0,
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
    }


def _layout(arch: Architecture, parallel: Parallel) -> dict[str, Any]:
    stages = place(arch, parallel)
    pipelined = len(stages) > 1
    return {
        "tensor_model_parallel_size": parallel.tp_size,
        "sequence_parallel": parallel.sequence_parallel,
        "pipeline_model_parallel_size": parallel.pp_size,
        "virtual_pipeline_model_parallel_size": parallel.vpp_size
        if parallel.vpp_size > 1
        else None,
        "pipeline_model_parallel_layout": mcore_layout(stages) if pipelined else None,
        # With two neighbours on one peer, batched exchange pairs up the wrong messages in silence.
        "overlap_p2p_comm": parallel.vpp_size > 1,
        "batch_p2p_comm": parallel.vpp_size == 1,
        "expert_model_parallel_size": parallel.ep_size,
        "expert_tensor_parallel_size": parallel.etp_size,
        "context_parallel_size": parallel.cp_size,
    }


def _numerics(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "bias_activation_fusion": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "persist_layer_norm": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        # Every weight is loaded, strictly: random numbers for 671B would cost minutes for nothing.
        "perform_initialization": False,
        # The loss is taken as it is: the step has made it a share of the mean over all counted
        # tokens, so that neither micro-batches nor the layout change it.
        "calculate_per_token_loss": True,
        "deallocate_pipeline_outputs": True,
        "cuda_graph_modules": [],
    }


def _device(
    device: torch.device, dtype: torch.dtype, kernels: KernelsSection, *, has_yarn: bool
) -> dict[str, Any]:
    """Kernels that Transformer Engine and Megatron-Core bring for a GPU."""
    if device.type != "cuda":
        return {"use_cpu_initialization": True}
    half = dtype is torch.bfloat16
    return {
        "use_cpu_initialization": False,
        # A fall-back to unfused attention is 4 to 80 times slower: let it fail instead. cuDNN has
        # no fp32 kernel, and fp32 is there for checks.
        "attention_backend": AttnBackend.fused if half else AttnBackend.unfused,
        "bias_activation_fusion": True,
        "gradient_accumulation_fusion": half,
        "moe_permute_fusion": True,
        "moe_router_fusion": kernels.fused_router,
        "apply_rope_fusion": kernels.fused_rope and half and has_yarn,
        "dense_single_documents": kernels.dense_single_documents and half,
        "fused_swiglu": kernels.fused_swiglu,
        "fused_update": kernels.fused_update,
        "cross_entropy_loss_fusion": kernels.fused_loss and half,
        "cross_entropy_fusion_impl": "te" if kernels.fused_loss and half else "native",
    }
