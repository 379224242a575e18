"""AdamW through Megatron-Core's distributed optimizer, its schedule, and one checked update."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_dsv3.config.sections import OptimizerSection, ScheduleSection
from megatron_dsv3.train.fused_update import FusedUpdate, fuse_updates
from megatron_dsv3.train.host_states import refine
from megatron_dsv3.train.remainders import keep_masters_whole


def build_optimizer(
    section: OptimizerSection, chunks: Sequence[DistributedDataParallel], *, dtype: torch.dtype
) -> Any:
    """The distributed optimizer: fp32 masters and moments, each held by one data-parallel rank."""
    config = optimizer_config(section, chunks[0].config, dtype=dtype)
    # The planner's ranks of a world that is not there have no groups on the host.
    has_gloo = dist.get_backend() != "fake"
    optimizer = get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=has_gloo)
    for part in optimizer.chained_optimizers:
        keep_masters_whole(part)
    refine(optimizer)
    if chunks[0].config.fused_update:
        fuse_updates(optimizer)
    return optimizer


def optimizer_config(section: OptimizerSection, model: Any, *, dtype: torch.dtype) -> Any:
    """Megatron-Core's configuration of the optimizer.

    Args:
        section: Of the job.
        model: The model's configuration, whose FP8 decides how masters reach the weights.
        dtype: Of the weights.
    """
    return OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=0.0,
        weight_decay=section.weight_decay,
        adam_beta1=section.beta1,
        adam_beta2=section.beta2,
        adam_eps=section.eps,
        clip_grad=section.clip_grad,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_distributed_optimizer=True,
        overlap_param_gather=section.overlap_param_gather,
        # FP8 products of bf16 weights are not the optimizer's business. Told of them, Megatron-Core
        # would keep fp32 masters, and copy bf16 gradients to fp32, where moments are bf16.
        fp8_recipe=model.fp8_recipe if model.fp8 and model.fp8_param else None,
        **_states(section),
    )


def _states(section: OptimizerSection) -> dict[str, Any]:
    """Where masters and moments live, and in which format."""
    options: dict[str, Any] = {}
    if section.moments == "bf16":
        options |= {
            "use_precision_aware_optimizer": True,
            "exp_avg_dtype": torch.bfloat16,
            "exp_avg_sq_dtype": torch.bfloat16,
        }
    if section.offload_fraction > 0:
        options |= {
            # Without it Megatron-Core holds a second set of masters on the GPU.
            "use_precision_aware_optimizer": True,
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": section.offload_fraction,
            "overlap_cpu_optimizer_d2h_h2d": True,
        }
    return options


def build_schedule(
    section: ScheduleSection, optimizer: Any, *, max_lr: float, weight_decay: float, num_steps: int
) -> OptimizerParamScheduler:
    """Linear warm-up to `max_lr`, then decay that reaches `min_lr` after `num_steps`."""
    warmup = section.warmup_steps
    if warmup is None:
        warmup = math.ceil((section.warmup_fraction or 0.0) * num_steps)
    for group in optimizer.param_groups:  # a group's own value wins over the schedule's
        group["min_lr"] = section.min_lr
    # Megatron-Core asks for at least one step of decay after the warm-up.
    warmup = min(warmup, num_steps - 1)
    return OptimizerParamScheduler(
        optimizer,
        # The first step counts too: Megatron-Core would give it a rate of init_lr.
        init_lr=max_lr / (warmup + 1),
        max_lr=max_lr,
        min_lr=section.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=num_steps,
        lr_decay_style=section.decay,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
    )


def gradient_norm(optimizer: Any) -> float:
    """Global L2 norm of all gradients, before clipping; collective, read on the host."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def clip_and_update(optimizer: Any, norm: float) -> None:
    """Scales the gradients of this (finite) norm down to `clip_grad`, and updates the parameters.

    With `gradient_norm`, what `ChainedOptimizer.step` does, with a look at the norm before anything
    changes.
    """
    for part in optimizer.chained_optimizers:
        update = getattr(part.optimizer, "step", None)
        if isinstance(update, FusedUpdate):
            update.factor = clip_factor(norm, part.config.clip_grad)
        elif part.config.clip_grad > 0 and (parameters := part.get_parameters()):
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=norm,
                # Where the optimizer keeps the masters, gradients are not in `.grad`.
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()


def clip_factor(norm: float, clip_grad: float) -> float:
    """What brings gradients of this norm to at most `clip_grad`, as Megatron-Core counts it."""
    return min(1.0, clip_grad / (norm + 1e-6)) if clip_grad > 0 else 1.0
