"""Speed and memory of the real training step on random weights and random tokens, on this machine.

A slice of DeepSeek-V3 keeps every width of the 671B and takes few layers, experts and words, so
that one GPU does per layer what it would do in the whole model: with as many experts as a token is
sent to, each expert gets every token, the load that expert parallelism over 32 ranks gives it.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from megatron_dsv3.config.architecture import DEEPSEEK_V3, Architecture
from megatron_dsv3.config.counts import count_parameters, flops_per_token
from megatron_dsv3.config.kernels import KernelsSection
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import (
    ExpertsSection,
    MemorySection,
    OptimizerSection,
    PrecisionSection,
)
from megatron_dsv3.data.batch import Batch, make_batch
from megatron_dsv3.data.store import Sample
from megatron_dsv3.model.build import build_chunks, wrap
from megatron_dsv3.model.config import mcore_config
from megatron_dsv3.model.groups import Groups
from megatron_dsv3.train.collector import few_collections
from megatron_dsv3.train.optimizer import build_optimizer
from megatron_dsv3.train.step import TrainStep

WARM_UP_STEPS = 3
BF16 = PrecisionSection()
ONE_RANK = Parallel()
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def slice_of_v3(
    *,
    num_layers: int = 3,
    num_dense_layers: int = 1,
    num_experts: int = 8,
    vocab_size: int = 16384,
    num_mtp_layers: int = 0,
) -> Architecture:
    """DeepSeek-V3 with all its widths, cut in depth, experts and words."""
    return replace(
        DEEPSEEK_V3,
        num_layers=num_layers,
        num_dense_layers=num_dense_layers,
        num_experts=num_experts,
        num_groups=1,
        num_groups_per_token=1,
        num_experts_per_token=min(DEEPSEEK_V3.num_experts_per_token, num_experts),
        vocab_size=vocab_size,
        num_mtp_layers=num_mtp_layers,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing to measure."""

    name: str
    arch: Architecture = field(default_factory=slice_of_v3)
    num_micro_batches: int = 1
    document_length: int = 4096
    """Tokens of each document."""
    num_documents: int = 1
    """Documents in a row, packed end to end; a row is a micro-batch."""
    precision: PrecisionSection = BF16
    memory: MemorySection = MemorySection()
    kernels: KernelsSection = KernelsSection()
    optimizer: OptimizerSection = OptimizerSection()
    experts: ExpertsSection = ExpertsSection()
    parallel: Parallel = ONE_RANK
    options: Mapping[str, Any] = field(default_factory=dict)
    """More fields of Megatron-Core's configuration."""

    @property
    def tokens_per_step(self) -> int:
        """Of all micro-batches of one data-parallel rank."""
        return self.num_micro_batches * self.num_documents * self.document_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a case took."""

    name: str
    step_ms: float
    """Median over the steps, back to back, from one update of the weights to the next."""
    fastest_ms: float
    """Of all steps: on a machine with other work on its cores, what the step itself takes."""
    tokens_per_second: float
    """Of each device."""
    tflops: float
    """Model FLOPs a second and device (causal attention, no recomputation counted), in 10^12."""
    peak_gib: float
    """Largest memory allocated on this process's device."""
    parameters: int
    loss: float
    """Of the last step."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A training step with everything it needs on the device."""

    step: TrainStep
    batches: Sequence[Batch]

    def one(self) -> float:
        """One whole step; its loss."""
        return self.step(self.batches).losses.main


def prepare(case: Case, groups: Groups, *, seed: int = 1) -> Prepared:
    """Builds model, optimizer and batches of a case on this device."""
    dtype = _DTYPES[case.precision.compute]
    config = mcore_config(
        case.arch,
        case.parallel,
        dtype=dtype,
        device=groups.device,
        experts=case.experts,
        memory=case.memory,
        precision=case.precision,
        kernels=case.kernels,
        options=case.options,
    )
    row_length = case.num_documents * case.document_length
    chunks = build_chunks(
        case.arch,
        case.parallel,
        groups,
        config,
        max_seq_length=row_length,
        transformer_engine=groups.device.type == "cuda",
    )
    generator = torch.Generator(device=groups.device).manual_seed(seed)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                fill_random(parameter, generator)
    wrapped = wrap(chunks, config, optimizer=case.optimizer)
    optimizer = build_optimizer(case.optimizer, wrapped, dtype=dtype)
    for group in optimizer.param_groups:
        group["lr"] = 1e-6
    step = TrainStep(wrapped, optimizer, groups, mtp_loss_weight=0.1)
    return Prepared(step, random_batches(case, seed=seed + groups.dp_rank))


def fill_random(parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Matrices as DeepSeek-V3's are initialised, norms at one."""
    if parameter.dim() == 1:
        parameter.fill_(1.0)
        return
    values = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    parameter.copy_(values.normal_(0.0, DEEPSEEK_V3.initializer_range, generator=generator))
    if hasattr(parameter, "get_high_precision_init_val"):
        setattr(parameter, "_high_precision_init_val", values.cpu())  # noqa: B010 - as in the bridge


def random_batches(case: Case, *, seed: int) -> list[Batch]:
    """Micro-batches of random tokens, all of which count."""
    rng = np.random.default_rng(seed)

    def sample(name: str) -> Sample:
        tokens = rng.integers(0, case.arch.vocab_size, case.document_length, dtype=np.int32)
        return Sample(name, tokens, np.ones(case.document_length, np.bool_))

    return [
        make_batch(
            [sample(f"random:{row}.{document}") for document in range(case.num_documents)],
            seq_length=case.document_length,
            num_mtp=case.arch.num_mtp_layers,
            pad_id=0,
        )
        for row in range(case.num_micro_batches)
    ]


def measure(
    case: Case,
    groups: Groups,
    *,
    num_steps: int = 10,
    afterwards: Callable[[Prepared], None] | None = None,
) -> Measured:
    """Times whole steps of a case: forward, backward, clipping, update.

    `afterwards` gets the step, warm, before its memory is given back.
    """
    reset_peak(groups.device)
    prepared = prepare(case, groups)
    losses: list[float] = []
    try:
        times = time_steps(
            lambda: losses.append(prepared.one()), groups.device, num_steps=num_steps
        )
        peak = peak_gib(groups.device)
        if afterwards is not None:
            afterwards(prepared)
    finally:
        free(prepared.step.chunks, prepared.step.optimizer)
    return summary(
        case.name,
        case.arch,
        times,
        num_tokens=case.tokens_per_step * groups.dp_size / groups.world_size,
        document_length=case.document_length,
        peak_gib=peak,
        loss=losses[-1],
    )


def summary(
    name: str,
    arch: Architecture,
    times: Sequence[float],
    *,
    num_tokens: float,
    document_length: int,
    peak_gib: float,
    loss: float,
) -> Measured:
    """What steps of `num_tokens` a device in documents of one length took; `times` in seconds."""
    seconds, counts = statistics.median(times), count_parameters(arch)
    return Measured(
        name=name,
        step_ms=seconds * 1e3,
        fastest_ms=min(times) * 1e3,
        tokens_per_second=num_tokens / seconds,
        tflops=num_tokens * flops_per_token(arch, document_length) / seconds / 1e12,
        peak_gib=peak_gib,
        parameters=counts.total + counts.mtp,
        loss=loss,
    )


@few_collections()
def time_steps(step: Callable[[], None], device: torch.device, *, num_steps: int) -> list[float]:
    """Seconds from the end of one step to the end of the next, on the device, after the warm-up.

    Back to back as in training: the host starts a step while the device is still at the one before.
    Python's collector is treated as in the training loop, for peers too.
    """
    for _ in range(WARM_UP_STEPS):
        step()
    _synchronize(device)
    ends = [_Moment(device)]
    for _ in range(num_steps):
        step()
        ends.append(_Moment(device))
    _synchronize(device)
    return [end.since(start) for start, end in pairwise(ends)]


class _Moment:
    """Of the device's work."""

    def __init__(self, device: torch.device) -> None:
        self.host = time.perf_counter()
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event is not None:
            self.event.record()

    def since(self, start: "_Moment") -> float:
        """Seconds; the device has finished both."""
        if self.event is None or start.event is None:
            return self.host - start.host
        return float(start.event.elapsed_time(self.event)) / 1e3


def gemm_roof_tflops(device: torch.device, *, size: int = 8192, repeats: int = 20) -> float:
    """Rate of a square bf16 product of random matrices: what this card reaches, not its paper."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def product() -> None:
        torch.matmul(left, right)

    times = time_steps(product, device, num_steps=repeats)
    return 2 * size**3 / statistics.median(times) / 1e12


def peak_gib(device: torch.device) -> float:
    """Since `reset_peak`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def reset_peak(device: torch.device) -> None:
    """Starts a new peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def free(chunks: Sequence[DistributedDataParallel], optimizer: Any) -> None:
    """Gives a case's memory back: hooks and caches hold the modules themselves on.

    Without it a second case of this size does not fit on the card.
    """
    for chunk in chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            _empty(buffer.param_data)
            _empty(buffer.grad_data)
        for module in chunk.modules():
            getattr(module, "_fp8_workspaces", {}).clear()  # Transformer Engine's copies of weights
        for parameter in chunk.parameters():
            if not hasattr(parameter, "get_high_precision_init_val"):  # FP8 ones take only FP8
                parameter.data = torch.empty(0, dtype=parameter.dtype)
    for part in optimizer.chained_optimizers:
        for master, state in part.optimizer.state.items():
            for tensor in [master, *state.values()]:
                _empty(tensor)


def _empty(tensor: Any) -> None:
    if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
        tensor.untyped_storage().resize_(0)


def release() -> None:
    """Drops what Megatron-Core keeps by name for the next forward."""
    parallel_state.destroy_global_memory_buffer()
    parallel_state._set_global_memory_buffer()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
