"""This rank's model chunks, built from architecture and layout, wrapped for data parallelism."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed import finalize_model_grads as mcore_finalize
from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.transformer.module import Float16Module
from torch import nn

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.placement import Stage, place
from megatron_dsv3.config.sections import OptimizerSection
from megatron_dsv3.model.config import DeepseekV3Config
from megatron_dsv3.model.gpt import DeepseekV3Model
from megatron_dsv3.model.groups import Groups
from megatron_dsv3.model.router import DeepseekV3Router
from megatron_dsv3.model.spec import block_specs


def stages_of_rank(arch: Architecture, parallel: Parallel, pp_rank: int) -> list[Stage]:
    """The chunks that a pipeline rank holds, in virtual-pipeline order."""
    return [stage for stage in place(arch, parallel) if stage.pp_rank == pp_rank]


def build_chunks(
    arch: Architecture,
    parallel: Parallel,
    groups: Groups,
    config: DeepseekV3Config,
    *,
    max_seq_length: int,
    transformer_engine: bool,
    meta: bool = False,
) -> list[DeepseekV3Model]:
    """Unwrapped models of this rank, one per virtual stage.

    Args:
        arch: The model.
        parallel: The layout.
        groups: From `groups.start`.
        config: From `mcore_config`.
        max_seq_length: Longest row that will be fed.
        transformer_engine: Take Transformer Engine's modules (needs a GPU) or plain torch's.
        meta: Build on the meta device: shapes, names and marks without memory.
    """
    chunks = []
    for stage in stages_of_rank(arch, parallel, groups.pp_rank):
        decoder, mtp = block_specs(config, stage, transformer_engine=transformer_engine)
        with torch.device("meta") if meta else contextlib.nullcontext():
            chunk = DeepseekV3Model(
                config,
                decoder,
                vocab_size=arch.vocab_size,
                max_sequence_length=max_seq_length,
                pre_process=stage.has_embedding,
                post_process=stage.has_loss,
                share_embeddings_and_output_weights=arch.tie_embeddings,
                position_embedding_type="none",  # MLA rotates inside its layers
                mtp_block_spec=mtp,
                vp_stage=stage.vpp_rank if parallel.vpp_size > 1 else None,
            )
        for parameter in chunk.parameters():
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        chunks.append(chunk if meta else chunk.to(groups.device))
    return chunks


def freeze_mtp(chunks: Sequence[DeepseekV3Model]) -> None:
    """Keeps the MTP layers' weights as they are; call before `wrap`."""
    for chunk in chunks:
        if chunk.mtp_process:
            chunk.mtp.requires_grad_(False)


def wrap(
    chunks: Sequence[DeepseekV3Model],
    config: DeepseekV3Config,
    *,
    optimizer: OptimizerSection = OptimizerSection(),
    num_optimizer_instances: int = 1,
) -> list[DistributedDataParallel]:
    """Mixed precision, then data parallelism with the distributed optimizer's gradient buffers.

    Sets the hooks by which Megatron-Core's schedules reduce gradients.
    """
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        num_distributed_optimizer_instances=num_optimizer_instances,
        grad_reduce_in_fp32=optimizer.gradients == "fp32",
        overlap_grad_reduce=optimizer.overlap_grad_reduce,
        overlap_param_gather=optimizer.overlap_param_gather,
        fp8_param_gather=config.fp8_param,
        check_for_nan_in_grad=False,  # the step checks loss and gradient norm itself, and names ids
    )
    inner = [Float16Module(config, chunk) if config.bf16 else chunk for chunk in chunks]
    # A later chunk's gradients arrive first; only the first chunk may still wait for more buckets.
    wrapped = [
        DistributedDataParallel(config, ddp_config, module, disable_bucketing=index > 0)
        for index, module in enumerate(inner)
    ]
    config.finalize_model_grads_func = mcore_finalize
    config.no_sync_func = _one_or_all([model.no_sync for model in wrapped])
    if optimizer.overlap_grad_reduce:
        config.grad_sync_func = _one_or_all([model.start_grad_sync for model in wrapped])
    if optimizer.overlap_param_gather:
        config.param_sync_func = _one_or_all([model.start_param_sync for model in wrapped])
    return wrapped


def unwrap(module: nn.Module) -> DeepseekV3Model:
    """The model inside data-parallel and precision wrappers."""
    inner: Any = module
    while not isinstance(inner, DeepseekV3Model):
        inner = inner.module
    return inner


def routers(chunks: Sequence[nn.Module]) -> list[DeepseekV3Router]:
    """All routers of these chunks, in layer order."""
    return [m for chunk in chunks for m in chunk.modules() if isinstance(m, DeepseekV3Router)]


def _one_or_all(functions: list[object]) -> object:
    """Megatron-Core's schedules expect a bare function where there is one chunk."""
    return functions[0] if len(functions) == 1 else functions
