"""Memory and time of whole training steps on one GPU, as the planner is held to them.

    python benchmarks/plan_memory.py --json tests/data/h100_jobs.json [--only NAME ...] [--steps 4]

Slices of DeepSeek-V3 with all its widths, on random tokens: precisions, recompute sets, packing,
depths, moments and sequence lengths. Of each case the file holds the settings, the largest memory
allocated in forward and backward and in the update, what stays between steps, and the time; what
was there before the case (workspaces of a first, discarded one, and whatever could not be given
back) is taken off.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel.fine_grained_activation_offload import PipelineOffloadManager

from megatron_dsv3.config.kernels import KernelsSection
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import MemorySection, OptimizerSection, PrecisionSection
from megatron_dsv3.model.groups import Groups, device_of, start, stop
from megatron_dsv3.plan.layouts import RECOMPUTE
from megatron_dsv3.train import bench

BF16_MOMENTS = OptimizerSection(moments="bf16")
BF16_GRADIENTS = OptimizerSection(moments="bf16", gradients="bf16")
HALF_ON_HOST = OptimizerSection(offload_fraction=0.5)
FP8 = PrecisionSection(fp8="blockwise")
FP8_PARAMETERS = PrecisionSection(fp8="blockwise", fp8_params=True)
FULL = MemorySection(recompute="full")
SELECTIVE = MemorySection(recompute="selective")
INPUTS_OFFLOADED = RECOMPUTE["inputs offloaded"]
"""The set that `plan search` tries."""
ALL_OFFLOADED = MemorySection(
    offload_activations=(
        "attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act",
    )
)  # fmt: skip


def _again(*modules: str) -> MemorySection:
    return MemorySection.model_validate({"recompute": "selective", "recompute_modules": modules})


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A slice and how it is trained."""

    name: str
    slice: dict[str, int]
    """Arguments of `slice_of_v3`."""
    num_micro_batches: int = 1
    document_length: int = 4096
    num_documents: int = 1
    precision: PrecisionSection = field(default=bench.BF16)
    memory: MemorySection = MemorySection()
    optimizer: OptimizerSection = OptimizerSection()
    kernels: KernelsSection = KernelsSection()

    @property
    def case(self) -> bench.Case:
        """As the bench takes it."""
        return bench.Case(
            name=self.name,
            arch=bench.slice_of_v3(**self.slice),
            num_micro_batches=self.num_micro_batches,
            document_length=self.document_length,
            num_documents=self.num_documents,
            precision=self.precision,
            memory=self.memory,
            optimizer=self.optimizer,
            kernels=self.kernels,
        )

    def settings(self) -> dict[str, Any]:
        """For the file; `Job(**...)` of it after validation of the sections is this job."""
        plain = ("name", "slice", "num_micro_batches", "document_length", "num_documents")
        sections = ("precision", "memory", "optimizer", "kernels")
        return {name: getattr(self, name) for name in plain} | {
            name: getattr(self, name).model_dump(mode="json") for name in sections
        }


ONE_OF_EACH = {"num_layers": 2, "num_dense_layers": 1}
THREE = {"num_layers": 3, "num_dense_layers": 1}
FOUR = {"num_layers": 4, "num_dense_layers": 1}
JOBS = [
    Job(name="bf16, 3 layers, 4k", slice=THREE),
    Job(name="fp8, 3 layers, 4k, 4 micro-batches", slice=THREE, precision=FP8, num_micro_batches=4),
    Job(name="bf16, 1 layer, 4k", slice={"num_layers": 1, "num_dense_layers": 0}),
    Job(name="bf16, 3 layers, selective, 8k", slice=THREE, memory=SELECTIVE, document_length=8192),
    Job(name="fp8, 3 layers, selective, 4k", slice=THREE, precision=FP8, memory=SELECTIVE),
    Job(
        name="bf16, 4 layers, selective, bf16 moments, 4k",
        slice=FOUR, memory=SELECTIVE, optimizer=BF16_MOMENTS,
    ),
    Job(
        name="bf16, 3 layers, full, bf16 moments, 32k of 8 documents",
        slice=THREE, memory=FULL, optimizer=BF16_MOMENTS, num_documents=8,
    ),
    Job(
        name="bf16, 2 layers, full, bf16 moments, 32k of one document",
        slice=ONE_OF_EACH, memory=FULL, optimizer=BF16_MOMENTS, document_length=32768,
    ),
    Job(
        name="fp8 parameters, 3 layers, bf16 moments, 8k of 2 documents",
        slice=THREE, precision=FP8_PARAMETERS, optimizer=BF16_MOMENTS, num_documents=2,
    ),
    Job(
        name="fp8, 2 layers, full, bf16 moments, 16k",
        slice=ONE_OF_EACH, precision=FP8, memory=FULL, optimizer=BF16_MOMENTS,
        document_length=16384,
    ),
    Job(
        name="bf16, 2 layers and MTP, bf16 moments, 4k",
        slice={**ONE_OF_EACH, "num_mtp_layers": 1}, optimizer=BF16_MOMENTS,
    ),
    Job(
        name="bf16, 2 layers, recompute moe, 8k",
        slice=ONE_OF_EACH, memory=_again("moe"), document_length=8192,
    ),
    Job(
        name="bf16, 2 layers, recompute core_attn and mlp, 8k",
        slice=ONE_OF_EACH, memory=_again("core_attn", "mlp", "shared_experts"),
        document_length=8192,
    ),
    Job(
        name="bf16, 2 layers, selective, bf16 moments and gradients, 16k of 4 documents",
        slice=ONE_OF_EACH, memory=SELECTIVE, optimizer=BF16_GRADIENTS, num_documents=4,
    ),
    Job(
        name="bf16, 2 layers, 129,280 words, bf16 moments, 4k",
        slice={**ONE_OF_EACH, "vocab_size": 129280}, optimizer=BF16_MOMENTS,
    ),
    Job(
        name="bf16, 4 layers, inputs offloaded, bf16 moments, 8k",
        slice=FOUR, memory=INPUTS_OFFLOADED, optimizer=BF16_MOMENTS, document_length=8192,
    ),
    Job(
        name="fp8 parameters, 4 layers, inputs offloaded, bf16 moments, 8k",
        slice=FOUR, memory=INPUTS_OFFLOADED, precision=FP8_PARAMETERS, optimizer=BF16_MOMENTS,
        document_length=8192,
    ),
    Job(
        name="fp8, 2 layers, bf16 moments and gradients, 4k",
        slice=ONE_OF_EACH, precision=FP8, optimizer=BF16_GRADIENTS,
    ),
    Job(name="bf16, 2 layers, half on the host, 4k", slice=ONE_OF_EACH, optimizer=HALF_ON_HOST),
    Job(
        name="fp8, 2 layers, half on the host, bf16 gradients, 4k",
        slice=ONE_OF_EACH, precision=FP8,
        optimizer=OptimizerSection(offload_fraction=0.5, gradients="bf16"),
    ),
    Job(
        name="fp8, 2 layers, on the host, 4k",
        slice=ONE_OF_EACH, precision=FP8, optimizer=OptimizerSection(offload_fraction=1.0),
    ),
    Job(
        name="bf16, 4 layers, all offloaded, bf16 moments, 8k",
        slice=FOUR, memory=ALL_OFFLOADED, optimizer=BF16_MOMENTS, document_length=8192,
    ),
]  # fmt: skip


def main() -> None:
    """Prints one line a job as it is done, and writes all to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=None, help="beginnings of names")
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    groups = start(Parallel(), device_of("cuda"))
    roof = bench.gemm_roof_tflops(groups.device)
    _one(Job(name="(first)", slice={"num_layers": 1, "num_dense_layers": 0}), groups, 1)
    _forget()
    results = []
    for job in JOBS:
        if arguments.only is None or any(job.name.startswith(only) for only in arguments.only):
            results.append(_one(job, groups, arguments.steps))
            _forget()
    properties = torch.cuda.get_device_properties(groups.device)
    about = {
        "device": properties.name,
        "memory_gib": properties.total_memory / 2**30,
        "gemm_roof_tflops": roof,
        "torch": torch.__version__,
    }
    arguments.json.write_text(json.dumps({"about": about, "jobs": results}, indent=1) + "\n")
    stop()


def _one(job: Job, groups: Groups, steps: int) -> dict[str, Any]:
    try:
        measured = _measure(job.case, groups, steps)
    except Exception as error:  # one job that fails must not cost the others
        reason = str(error).splitlines()[0]
        print(f"{job.name:72} failed: {reason[:120]}", flush=True)
        return job.settings() | {"failed": reason}
    sizes = " ".join(
        f"{key} {value / 2**30:.2f}" for key, value in measured.items() if key != "step_ms"
    )
    print(f"{job.name:72} {measured['step_ms']:7.1f} ms, GiB: {sizes}", flush=True)
    return job.settings() | {"measured": measured}


def _forget() -> None:
    """Gives back what the last job left, so that the next one allocates it anew."""
    # Imported here: there is none where this file is only read.
    from transformer_engine.pytorch.module import base

    base._dummy_wgrads.clear()
    # It remembers the layers of the last model, and what of them it offloads.
    PipelineOffloadManager.OFFLOAD_MGR = None
    bench.release()


def _measure(case: bench.Case, groups: Groups, steps: int) -> dict[str, float]:
    """Bytes, and milliseconds of a step."""
    device = groups.device
    before = torch.cuda.memory_allocated(device)
    bench.reset_peak(device)
    prepared = bench.prepare(case, groups)
    chunk, optimizer = prepared.step.chunks[0], prepared.step.optimizer
    built = torch.cuda.memory_allocated(device)
    seen: dict[str, int] = {}

    def after_forward(*_: object) -> None:
        seen["after_forward"] = torch.cuda.memory_allocated(device)

    def before_update() -> Any:
        seen["peak_forward_backward"] = torch.cuda.max_memory_allocated(device)
        seen["after_backward"] = torch.cuda.memory_allocated(device)
        bench.reset_peak(device)
        return prepare_grads()

    try:
        times = bench.time_steps(lambda: [prepared.one()], device, num_steps=steps)
        between = torch.cuda.memory_allocated(device)
        bench.reset_peak(device)
        hook = chunk.register_forward_hook(after_forward)
        prepare_grads, optimizer.prepare_grads = optimizer.prepare_grads, before_update
        prepared.one()
        hook.remove()
        seen["peak_update"] = torch.cuda.max_memory_allocated(device)
    finally:
        bench.free(prepared.step.chunks, optimizer)
    seen["peak"] = max(seen["peak_forward_backward"], seen["peak_update"])
    return {
        "step_ms": sorted(times)[len(times) // 2] * 1e3,
        "before": before,
        "built": built - before,
        "between_steps": between - before,
        **{name: size - before for name, size in seen.items()},
    }


if __name__ == "__main__":
    main()
