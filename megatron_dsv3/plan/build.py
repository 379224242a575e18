"""The chunks of one rank on the meta device, as a GPU would hold them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_dsv3.config.placement import Stage, mtp_stage, place
from megatron_dsv3.config.sections import PrecisionSection
from megatron_dsv3.model.build import build_chunks, freeze_mtp, stages_of_rank, unwrap, wrap
from megatron_dsv3.model.config import mcore_config
from megatron_dsv3.model.gpt import DeepseekV3Model
from megatron_dsv3.model.groups import Groups
from megatron_dsv3.plan.offloading import on_meta
from megatron_dsv3.plan.ranks import as_rank, rank_of_stage
from megatron_dsv3.plan.records import Workload
from megatron_dsv3.plan.stand_ins import kernels, stand_in

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GPU_OPTIONS = {
    "use_cpu_initialization": False,
    "bias_activation_fusion": True,
    "moe_permute_fusion": True,
}
"""What `mcore_config` takes on a GPU and a CPU has no kernels for; stand-ins have."""


@dataclass(frozen=True, slots=True)
class Built:
    """One rank's chunks, in virtual-pipeline order, in its process groups."""

    groups: Groups
    config: Any
    stages: list[Stage]
    wrapped: list[DistributedDataParallel]

    @property
    def chunks(self) -> list[DeepseekV3Model]:
        """Without wrappers."""
        return [unwrap(module) for module in self.wrapped]


@contextmanager
def built(workload: Workload, pp_rank: int) -> Iterator[Built]:
    """Builds the first rank of a pipeline stage; its groups end with the context."""
    parallel, precision = workload.parallel, workload.precision
    dtype = DTYPES[precision.compute]
    stages = place(workload.arch, parallel)
    rank = rank_of_stage(pp_rank, parallel, workload.world_size)
    world_size, mtp = workload.world_size, mtp_stage(stages)
    with kernels(), on_meta(), as_rank(parallel, rank, world_size, mtp_stage=mtp) as groups:
        config = mcore_config(
            workload.arch,
            parallel,
            dtype=dtype,
            device=torch.device("cpu"),
            experts=workload.experts,
            memory=workload.memory,
            # Stand-ins know what FP8 holds; Megatron-Core asks for Transformer Engine at once.
            precision=PrecisionSection(compute=precision.compute),
            options=GPU_OPTIONS | {"gradient_accumulation_fusion": dtype is torch.bfloat16},
        )
        chunks = build_chunks(
            workload.arch,
            parallel,
            groups,
            config,
            max_seq_length=workload.seq_length * workload.micro_batch_size,
            transformer_engine=False,
            meta=True,
        )
        if workload.mtp_frozen:
            freeze_mtp(chunks)
        held = stages_of_rank(workload.arch, parallel, pp_rank)
        for stage, chunk in zip(held, chunks, strict=True):
            named = partial(_precision, stage, workload)
            stand_in(chunk, named, keep_input=_keep_input(workload))
        wrapped = wrap(
            chunks,
            config,
            # Overlapping changes no bytes, and its messages are not made for the meta device.
            optimizer=workload.optimizer.model_copy(
                update={"overlap_grad_reduce": False, "overlap_param_gather": False}
            ),
            num_optimizer_instances=parallel.num_optimizer_instances,
        )
        yield Built(groups, config, held, wrapped)


def _precision(stage: Stage, workload: Workload, module: str) -> str:
    """Of a module's products, as the table of saved tensors says it."""
    precision = workload.precision
    top, _, rest = module.partition(".layers.")
    if precision.fp8 == "off" or not rest:
        return "bf16"
    if top == "decoder":
        layer = stage.layers[int(rest.partition(".")[0])]
        behind = workload.arch.num_layers - precision.bf16_last_layers
        if not precision.bf16_first_layers <= layer < behind:
            return "bf16"
    return precision.fp8


def _keep_input(workload: Workload) -> frozenset[str]:
    """Modules that Megatron-Core tells to hold their input as it is, under FP8.

    Attention's result is held by attention itself, the shared experts' input by the router; what a
    norm or activation that is computed again gives must be the very tensor that is held, and so
    must what is offloaded.
    """
    names = {"self_attention.linear_proj", "shared_experts.linear_fc1"}
    memory = workload.memory
    again = memory.recompute_modules if memory.recompute == "selective" else ()
    if "layernorm" in again:
        names |= {"linear_q_down_proj", "linear_kv_down_proj"}
    if "moe_act" in again:
        names.add("mlp.experts.linear_fc2")
    if "expert_fc1" in memory.offload_activations:
        names.add("mlp.experts.linear_fc1")
    return frozenset(names)
