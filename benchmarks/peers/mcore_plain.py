"""Megatron-Core as its users take it: GPTModel with its own specs and defaults in a plain loop."""

import contextlib

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.model.groups import Groups
from megatron_dsv3.train.bench import (
    ONE_RANK,
    Measured,
    free,
    peak_gib,
    reset_peak,
    slice_of_v3,
    summary,
    time_steps,
)

SEQ_LENGTH = 4096
SLICE = slice_of_v3()


def config(
    fp8: str | None, arch: Architecture = SLICE, parallel: Parallel = ONE_RANK
) -> MLATransformerConfig:
    """The slice in Megatron-Core's words; what is not about the model is left at its default."""
    return MLATransformerConfig(
        num_layers=arch.num_layers, hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size, num_attention_heads=arch.num_heads,
        q_lora_rank=arch.q_lora_rank, kv_lora_rank=arch.kv_lora_rank,
        qk_head_dim=arch.qk_head_dim, qk_pos_emb_head_dim=arch.qk_rope_head_dim,
        v_head_dim=arch.v_head_dim, qk_layernorm=True, rope_type="yarn",
        rotary_scaling_factor=40, mscale=1.0, mscale_all_dim=1.0,
        normalization="RMSNorm", layernorm_epsilon=arch.rms_norm_eps, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False,
        attention_dropout=0.0, hidden_dropout=0.0,
        num_moe_experts=arch.num_experts,
        moe_layer_freq=[int(arch.is_moe_layer(layer)) for layer in range(arch.num_layers)],
        moe_ffn_hidden_size=arch.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=arch.moe_ffn_hidden_size,
        moe_router_topk=arch.num_experts_per_token, moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True, moe_router_topk_scaling_factor=2.5,
        moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=1e-4,
        moe_router_dtype="fp32", moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=True, moe_permute_fusion=True,
        bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16,
        bias_activation_fusion=True, gradient_accumulation_fusion=True,
        attention_backend=AttnBackend.fused,
        tensor_model_parallel_size=parallel.tp_size, sequence_parallel=parallel.sequence_parallel,
        expert_model_parallel_size=parallel.ep_size, expert_tensor_parallel_size=parallel.etp_size,
        fp8="e4m3" if fp8 else None, fp8_recipe=fp8 or "delayed",
    )  # fmt: skip


def measure(
    groups: Groups,
    num_micro_batches: int,
    fp8: str | None,
    num_steps: int,
    *,
    arch: Architecture = SLICE,
    parallel: Parallel = ONE_RANK,
) -> Measured:
    """Whole steps: forward and backward of every micro-batch, clipping, update.

    Several GPUs share experts and layers' widths; there is no pipeline and no context parallelism.
    """
    reset_peak(groups.device)
    model_config = config(fp8, arch, parallel)
    model = GPTModel(
        model_config,
        get_gpt_decoder_block_spec(model_config, use_transformer_engine=True),
        vocab_size=arch.vocab_size,
        max_sequence_length=SEQ_LENGTH,
        position_embedding_type="none",
        share_embeddings_and_output_weights=False,
    ).cuda()
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(model_config, ddp, Float16Module(model_config, model))
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=1e-6, weight_decay=0.0, clip_grad=1.0, bf16=True,
            params_dtype=torch.bfloat16, use_distributed_optimizer=True,
        ),
        [wrapped],
    )  # fmt: skip
    tokens = torch.randint(0, arch.vocab_size, (num_micro_batches, 1, SEQ_LENGTH), device="cuda")
    positions = torch.arange(SEQ_LENGTH, device="cuda")[None]
    losses: list[torch.Tensor] = []

    def step() -> None:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        for index, row in enumerate(tokens):
            with wrapped.no_sync() if index < len(tokens) - 1 else contextlib.nullcontext():
                loss = wrapped(row, positions, None, labels=row.roll(-1, 1)).mean() / len(tokens)
                optimizer.scale_loss(loss).backward()
        finalize_model_grads([wrapped])
        optimizer.step()
        losses.append(loss.detach() * len(tokens))

    try:
        times = time_steps(step, groups.device, num_steps=num_steps)
    finally:
        free([wrapped], optimizer)
    return summary(
        "mcore",
        arch,
        times,
        num_tokens=num_micro_batches * SEQ_LENGTH * groups.dp_size / groups.world_size,
        document_length=SEQ_LENGTH,
        peak_gib=peak_gib(groups.device),
        loss=float(losses[-1]),
    )
