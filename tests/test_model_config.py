"""What the 671B's config.json means in Megatron-Core's words, field by field, by hand."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_dsv3.config.architecture import DEEPSEEK_V3, Yarn
from megatron_dsv3.config.kernels import KernelsSection
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import ExpertsSection, MemorySection, PrecisionSection
from megatron_dsv3.model import config as module
from megatron_dsv3.model.config import DeepseekV3Config, mcore_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ALL = KernelsSection(fused_loss=True)
CUDA_ONLY = {
    "use_cpu_initialization", "attention_backend", "bias_activation_fusion",
    "gradient_accumulation_fusion", "moe_permute_fusion",
    "apply_rope_fusion", "dense_single_documents", "cross_entropy_loss_fusion",
    "cross_entropy_fusion_impl", "moe_router_fusion", "fused_swiglu", "fused_update",
}  # fmt: skip
"""Fields that choose a kernel or a place, never a number."""

V3: Mapping[str, Any] = {
    # Sizes
    "num_layers": 61,
    "mtp_num_layers": 1,
    "hidden_size": 7168,
    "ffn_hidden_size": 18432,
    "num_attention_heads": 128,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-6,
    "init_method_std": 0.02,
    # Multi-head latent attention
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "qk_layernorm": True,
    # YaRN; Megatron-Core's own mscale_all_dim is 0, which moves logits by 3
    "rotary_base": 10000.0,
    "rope_type": "yarn",
    "rotary_scaling_factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "yarn_truncate": True,
    # Mixture of experts
    "num_moe_experts": 256,
    "moe_layer_freq": [0] * 3 + [1] * 58,
    "moe_ffn_hidden_size": 2048,
    "moe_shared_expert_intermediate_size": 2048,
    "moe_router_topk": 8,
    "moe_router_num_groups": 8,
    "moe_router_group_topk": 4,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_normalize_topk": True,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_dtype": "fp32",
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
    "overlap_moe_expert_parallel_comm": False,
    "moe_grouped_gemm": True,
    "moe_z_loss_coeff": None,
    "sequence_balance_coefficient": 0.0001,
    # No parallelism
    "tensor_model_parallel_size": 1,
    "sequence_parallel": False,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "overlap_p2p_comm": False,
    "batch_p2p_comm": True,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "context_parallel_size": 1,
    # Numerics: RMSNorm, SwiGLU, no bias, no dropout
    "params_dtype": torch.bfloat16,
    "pipeline_dtype": torch.bfloat16,
    "bf16": True,
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
    "use_cpu_initialization": True,
    "perform_initialization": False,
    "calculate_per_token_loss": True,
    "deallocate_pipeline_outputs": True,
    "cuda_graph_modules": [],
}
PLAIN = {"rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale": 1.0}
YARN_FIELDS = {
    "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale_all_dim", "yarn_truncate",
}  # fmt: skip


def _config(arch=DEEPSEEK_V3, parallel=None, **changes: Any) -> DeepseekV3Config:
    arguments = {
        "dtype": torch.bfloat16,
        "device": CPU,
        **changes,
    }
    return mcore_config(arch, parallel or Parallel(), **arguments)


@pytest.fixture
def given(monkeypatch):
    """What `mcore_config` hands to Megatron-Core, before that adds and derives."""

    def values(*arguments: Any, **changes: Any) -> dict[str, Any]:
        with monkeypatch.context() as patch:
            patch.setattr(module, "DeepseekV3Config", dict)
            return _config(*arguments, **changes)

    return values


def test_the_671b_is_given_these_values_and_no_others(given):
    assert given() == V3


def test_megatron_keeps_every_value_of_the_671b():
    config = _config()
    assert {name: getattr(config, name) for name in V3} == V3


def test_plain_rope_has_no_scaling(given):
    plain = given(replace(DEEPSEEK_V3, yarn=None, rope_theta=50000.0))
    expected = {k: v for k, v in V3.items() if k not in YARN_FIELDS}
    assert plain == {**expected, **PLAIN, "rotary_base": 50000.0}


@pytest.mark.parametrize(
    ("yarn", "expected"),
    [
        # transformers takes 0.1 * ln(factor) + 1 where the two are not both given
        (Yarn(factor=40.0, original_max_position_embeddings=4096), (1.0, 0.0)),
        (
            Yarn(
                factor=8.0,
                original_max_position_embeddings=64,
                mscale=0.7,
                mscale_all_dim=1.3,
                truncate=False,
            ),
            (0.7, 1.3),
        ),
    ],
    ids=["without mscale", "with two mscales"],
)
def test_other_yarns(given, yarn, expected):
    values = given(replace(DEEPSEEK_V3, yarn=yarn))
    assert (values["mscale"], values["mscale_all_dim"]) == pytest.approx(expected)
    assert values["rotary_scaling_factor"] == yarn.factor
    assert values["yarn_truncate"] is yarn.truncate


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"q_lora_rank": None}, "q_lora_rank", None),
        ({"num_mtp_layers": 0}, "mtp_num_layers", None),
        ({"num_mtp_layers": 2}, "mtp_num_layers", 2),
        ({"num_shared_experts": 2}, "moe_shared_expert_intermediate_size", 4096),
        ({"num_dense_layers": 0}, "moe_layer_freq", [1] * 61),
        ({"num_groups": 1, "num_groups_per_token": 1}, "moe_router_num_groups", 1),
        ({"normalize_topk": False}, "moe_router_normalize_topk", False),
        ({"rms_norm_eps": 1e-5}, "layernorm_epsilon", 1e-5),
        ({"v_head_dim": 96}, "kv_channels", 96),
    ],
)
def test_other_models(given, change, field, value):
    assert given(replace(DEEPSEEK_V3, **change))[field] == value


def test_the_latent_norms_keep_their_epsilon():
    """transformers builds them without one, whatever rms_norm_eps says."""
    assert _config(replace(DEEPSEEK_V3, rms_norm_eps=1e-3)).latent_norm_epsilon == 1e-6


def test_a_layout_in_megatrons_words(given):
    parallel = Parallel(tp_size=2, pp_size=4, vpp_size=2, ep_size=8, etp_size=1, cp_size=2)
    differing = {k: v for k, v in given(DEEPSEEK_V3, parallel).items() if V3[k] != v}
    layout = differing.pop("pipeline_model_parallel_layout")
    assert differing == {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "pipeline_model_parallel_size": 4,
        "virtual_pipeline_model_parallel_size": 2,
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
        "expert_model_parallel_size": 8,
        "context_parallel_size": 2,
    }
    assert len(layout) == 8
    assert sum(stage.count("decoder") for stage in layout) == 61
    assert layout[0][0] == "embedding"
    assert layout[-1][-2:] == ["mtp", "loss"]


def test_one_chunk_a_stage_exchanges_in_batches(given):
    values = given(DEEPSEEK_V3, Parallel(pp_size=8))
    assert values["virtual_pipeline_model_parallel_size"] is None
    assert (values["overlap_p2p_comm"], values["batch_p2p_comm"]) == (False, True)
    assert len(values["pipeline_model_parallel_layout"]) == 8


def test_fp32(given):
    differing = {k: v for k, v in given(dtype=torch.float32).items() if V3[k] != v}
    fp32 = torch.float32
    assert differing == {"params_dtype": fp32, "pipeline_dtype": fp32, "bf16": False}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gpu_changes_kernels_and_no_numbers(given, dtype):
    on_cpu, on_gpu = given(dtype=dtype), given(dtype=dtype, device=CUDA)
    differing = {k for k in on_cpu.keys() | on_gpu.keys() if on_cpu.get(k) != on_gpu.get(k)}
    assert differing <= CUDA_ONLY
    assert on_gpu["use_cpu_initialization"] is False


KERNEL_FIELDS = (
    "apply_rope_fusion", "dense_single_documents", "cross_entropy_loss_fusion",
    "cross_entropy_fusion_impl", "moe_router_fusion",
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (True, True, False, "native", True)),
        ({"kernels": KernelsSection(fused_rope=False)}, (False, True, False, "native", True)),
        (
            {"kernels": KernelsSection(dense_single_documents=False)},
            (True, False, False, "native", True),
        ),
        ({"kernels": KernelsSection(fused_loss=True)}, (True, True, True, "te", True)),
        (
            {"kernels": KernelsSection(fused_router=False)},
            (True, True, False, "native", False),
        ),
        # fp32 is there for checks; the kernels are for bf16, the rotation for YaRN's angles.
        ({"dtype": torch.float32, "kernels": ALL}, (False, False, False, "native", True)),
        (
            {"arch": replace(DEEPSEEK_V3, yarn=None), "kernels": ALL},
            (False, True, True, "te", True),
        ),
    ],
    ids=str,
)
def test_kernels_are_taken_on_a_gpu_as_asked_for(given, changes, expected):
    values = given(device=CUDA, **changes)
    assert tuple(values[name] for name in KERNEL_FIELDS) == expected


@pytest.mark.parametrize("name", ["fused_swiglu", "fused_update"])
def test_a_kernel_can_be_left_out(given, name):
    assert given(device=CUDA)[name] is True
    assert given(device=CUDA, kernels=KernelsSection(**{name: False}))[name] is False


def test_options_come_last(given):
    options = {"recompute_granularity": "full", "moe_aux_loss_coeff": 0.5}
    values = given(options=options)
    assert values["recompute_granularity"] == "full"
    assert values["moe_aux_loss_coeff"] == 0.5


def test_the_jobs_sections_reach_the_configuration(given):
    experts = ExpertsSection(
        aux_loss_coefficient=0.5, z_loss_coefficient=0.25, dispatcher="allgather"
    )
    memory = MemorySection(
        recompute="selective", recompute_modules=["moe_act"], offload_activations=["attn_norm"]
    )
    values = given(experts=experts, memory=memory)
    assert {k: v for k, v in values.items() if k not in V3 or V3[k] != v} == {
        "sequence_balance_coefficient": 0.5,
        "moe_z_loss_coeff": 0.25,
        "moe_token_dispatcher_type": "allgather",
        "recompute_granularity": "selective",
        "recompute_modules": ["moe_act"],
        "fine_grained_activation_offloading": True,
        "offload_modules": ["attn_norm"],
    }


def test_full_recompute_keeps_every_layers_input(given):
    values = given(memory=MemorySection(recompute="full"))
    assert {k: v for k, v in values.items() if k not in V3 or V3[k] != v} == {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }


@pytest.mark.parametrize(
    ("number", "message"),
    [(8, r"num_layers_at_start_in_bf16 \(8\) must be between 0"), (7, "transformer-engine>=")],
)
def test_megatron_core_takes_as_many_layers_out_of_fp8_as_a_job_may_have(number, message):
    """61 over 8 stages; what it asks for next, and lacks on a CPU, is Transformer Engine."""
    precision = PrecisionSection(fp8="blockwise", bf16_first_layers=number)
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=message):
        mcore_config(
            DEEPSEEK_V3, Parallel(pp_size=8), dtype=torch.bfloat16, device=cpu, precision=precision
        )
