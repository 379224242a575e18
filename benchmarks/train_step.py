"""The training step on one GPU beside raw Megatron-Core and transformers, in one run on one card.

    python benchmarks/train_step.py [--only NAME ...] [--steps 10] [--json FILE]

All take the same slice of DeepSeek-V3 (its widths; 1 dense and 2 MoE layers, 8 experts), the same
tokens a step, AdamW and clipping. Peers: a plain loop over Megatron-Core's GPTModel with its own
specs and defaults, and transformers' DeepseekV3ForCausalLM with grouped_mm and SDPA. TFLOP/s count
the model's FLOPs with causal attention.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from peers import mcore_plain, transformers_plain

from megatron_dsv3.config.kernels import KernelsSection
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import MemorySection, OptimizerSection, PrecisionSection
from megatron_dsv3.model.groups import Groups, device_of, start, stop
from megatron_dsv3.train import bench
from megatron_dsv3.train.bench import Case, Measured, slice_of_v3

FP8 = PrecisionSection(fp8="blockwise")
TENSORWISE = PrecisionSection(fp8="tensorwise")
FP8_PARAMS = PrecisionSection(fp8="blockwise", fp8_params=True)
BF16_MOMENTS = OptimizerSection(moments="bf16")
FULL = MemorySection(recompute="full")
SELECTIVE = MemorySection(recompute="selective")
WIDE = MemorySection(
    recompute="selective",
    recompute_modules=("mla_up_proj", "layernorm", "moe_act", "mlp", "shared_experts"),
)
PLAIN = KernelsSection(fused_rope=False, dense_single_documents=False)
PACKED = KernelsSection(dense_single_documents=False)
FUSED_LOSS = KernelsSection(fused_loss=True)
FULL_VOCABULARY = slice_of_v3(vocab_size=129280)

CASES = [
    Case(name="bf16 1x4k"),
    Case(name="bf16 1x4k plain kernels", kernels=PLAIN),
    Case(name="bf16 4x4k", num_micro_batches=4),
    Case(name="bf16 4x4k plain kernels", num_micro_batches=4, kernels=PLAIN),
    Case(name="bf16 4x4k packed attention", num_micro_batches=4, kernels=PACKED),
    Case(name="bf16 4x4k fused loss", num_micro_batches=4, kernels=FUSED_LOSS),
    Case(name="fp8 1x4k", precision=FP8),
    Case(name="fp8 4x4k", precision=FP8, num_micro_batches=4),
    Case(name="fp8 8x4k", precision=FP8, num_micro_batches=8),
    Case(name="fp8 2x(2x4k)", precision=FP8, num_micro_batches=2, num_documents=2),
    Case(name="fp8 1x(4x4k)", precision=FP8, num_documents=4, memory=SELECTIVE),
    Case(name="fp8 4x4k selective", precision=FP8, num_micro_batches=4, memory=SELECTIVE),
    Case(name="fp8 4x4k full", precision=FP8, num_micro_batches=4, memory=FULL),
    Case(name="bf16 4x4k moments bf16", num_micro_batches=4, optimizer=BF16_MOMENTS),
    Case(name="tensorwise 4x4k", precision=TENSORWISE, num_micro_batches=4),
    Case(
        name="fp8 params 4x4k moments bf16",
        precision=FP8_PARAMS, num_micro_batches=4, optimizer=BF16_MOMENTS,
    ),
    Case(name="fp8 2x8k", precision=FP8, num_micro_batches=2, document_length=8192),
    Case(
        name="bf16 32k packed full", num_documents=8, memory=FULL, optimizer=BF16_MOMENTS,
    ),
    Case(
        name="bf16 32k one document full",
        document_length=32768, memory=FULL, optimizer=BF16_MOMENTS,
    ),
    Case(
        name="bf16 4x4k vocabulary 129k",
        arch=FULL_VOCABULARY, num_micro_batches=4, memory=SELECTIVE, optimizer=BF16_MOMENTS,
    ),
    Case(
        name="bf16 4x4k vocabulary 129k fused loss", kernels=FUSED_LOSS,
        arch=FULL_VOCABULARY, num_micro_batches=4, memory=SELECTIVE, optimizer=BF16_MOMENTS,
    ),
]  # fmt: skip

PEERS: dict[str, Callable[[Groups, int], Measured]] = {
    "mcore bf16 1x4k": lambda groups, steps: mcore_plain.measure(groups, 1, None, steps),
    "mcore bf16 4x4k": lambda groups, steps: mcore_plain.measure(groups, 4, None, steps),
    "mcore fp8 4x4k": lambda groups, steps: mcore_plain.measure(groups, 4, "blockwise", steps),
    "transformers bf16 4x4k": lambda groups, steps: transformers_plain.measure(groups, 4, steps),
}


def main() -> None:
    """Prints one line a case as it is done, and writes all to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=None, help="names, `*` for any part of one")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", default=None, help="one case by kind of kernel, no timing")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    groups = start(Parallel(), device_of("cuda"))
    roof = bench.gemm_roof_tflops(groups.device)
    print(f"{torch.cuda.get_device_name()}, bf16 GEMM roof {roof:.0f} TFLOP/s", flush=True)
    runs = {
        case.name: lambda g, n, case=case: bench.measure(case, g, num_steps=n) for case in CASES
    } | PEERS
    results = []
    for case in CASES:
        if case.name == arguments.profile:
            _profile(case, groups)
    for name, run in runs.items():
        if arguments.profile:
            break
        if arguments.only is None or any(fnmatchcase(name, only) for only in arguments.only):
            results += _one(name, run, groups, arguments.steps, roof)
            bench.release()
    if arguments.json:
        arguments.json.write_text(json.dumps({"roof": roof, "results": results}, indent=1))
    stop()


def _profile(case: Case, groups: Groups) -> None:
    prepared = bench.prepare(case, groups)
    for _ in range(bench.WARM_UP_STEPS):
        prepared.one()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        prepared.one()
        torch.cuda.synchronize()
    table = profiler.key_averages()
    print(table.table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=70))
    print(table.table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=50))


def _one(
    name: str, run: Callable[[Groups, int], Measured], groups: Groups, steps: int, roof: float
) -> list[dict[str, float | str]]:
    try:
        got = replace(run(groups, steps), name=name)
    except Exception as error:
        print(f"{name:32} failed: {str(error).splitlines()[0][:150]}", flush=True)
        if not isinstance(error, torch.cuda.OutOfMemoryError):
            traceback.print_exc(limit=-6, file=sys.stdout)
        return [{"name": name, "failed": str(error).splitlines()[0]}]
    print(
        f"{name:32} {got.step_ms:7.1f} ms (+-{got.spread_ms:5.1f}) {got.tokens_per_second:9,.0f} "
        f"tok/s {got.tflops:6.1f} TFLOP/s {got.tflops / roof:5.1%} of the roof "
        f"{got.peak_gib:5.1f} GiB loss {got.loss:.4f}",
        flush=True,
    )
    return [asdict(got)]


if __name__ == "__main__":
    main()
