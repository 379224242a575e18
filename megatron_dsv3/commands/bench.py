"""`megatron-dsv3 bench`: the real training step on this machine's GPU, timed case by case."""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_dsv3.config.architecture import DEEPSEEK_V3, Architecture
from megatron_dsv3.config.kernels import KernelsSection
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import (
    MemorySection,
    OptimizerSection,
    PrecisionSection,
)
from megatron_dsv3.model.groups import Groups, device_of, start, stop
from megatron_dsv3.train import bench
from megatron_dsv3.train.bench import Case, Measured, slice_of_v3
from megatron_dsv3.train.kernel_kinds import profile_step

GIB = 2**30
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
PLAIN = KernelsSection(
    fused_rope=False, dense_single_documents=False, fused_router=False, fused_swiglu=False,
    fused_update=False,
)  # fmt: skip
PACKED = KernelsSection(dense_single_documents=False)
FUSED_LOSS = KernelsSection(fused_loss=True)
COMPILED_SWIGLU = KernelsSection(fused_loss=True, fused_swiglu=False)
UPDATE_IN_TWO = KernelsSection(fused_loss=True, fused_update=False)
ROUTER_IN_TORCH = KernelsSection(fused_router=False)
FULL_VOCABULARY = slice_of_v3(vocab_size=129280)
MANY_EXPERTS = slice_of_v3(num_experts=32)
BF16_STATES = OptimizerSection(moments="bf16", gradients="bf16")
FASTEST_FP8: Mapping[str, Any] = {
    "precision": FP8,
    "kernels": FUSED_LOSS,
    "optimizer": BF16_MOMENTS,
}
"""All that measured better."""


def _whole(num_layers: int) -> Architecture:
    """A whole model of DeepSeek-V3's shape, heads, words and MTP, for one card."""
    return replace(
        DEEPSEEK_V3,
        num_layers=num_layers,
        num_dense_layers=1,
        hidden_size=2048,
        ffn_hidden_size=8192,
        moe_ffn_hidden_size=768,
        num_heads=16,
        q_lora_rank=768,
        num_experts=64,
    )


CASES = [
    Case(name="bf16 1x4k"),
    Case(name="bf16 1x4k plain kernels", kernels=PLAIN),
    Case(name="bf16 4x4k", num_micro_batches=4),
    Case(name="bf16 4x4k plain kernels", num_micro_batches=4, kernels=PLAIN),
    Case(name="bf16 4x4k packed attention", num_micro_batches=4, kernels=PACKED),
    Case(name="bf16 8x4k", num_micro_batches=8),
    Case(name="bf16 2x8k", num_micro_batches=2, document_length=8192),
    Case(name="bf16 4x4k fused loss", num_micro_batches=4, kernels=FUSED_LOSS),
    Case(name="fp8 1x4k", precision=FP8),
    Case(name="fp8 4x4k", precision=FP8, num_micro_batches=4),
    Case(
        name="fp8 4x4k router in torch",
        precision=FP8, num_micro_batches=4, kernels=ROUTER_IN_TORCH,
    ),
    Case(name="fp8 4x4k fastest", num_micro_batches=4, **FASTEST_FP8),
    Case(
        name="fp8 4x4k fastest compiled swiglu",
        num_micro_batches=4, **{**FASTEST_FP8, "kernels": COMPILED_SWIGLU},
    ),
    Case(
        name="fp8 4x4k fastest update by Transformer Engine",
        num_micro_batches=4, **{**FASTEST_FP8, "kernels": UPDATE_IN_TWO},
    ),
    Case(name="fp8 8x4k", precision=FP8, num_micro_batches=8),
    # A quarter of the tokens for each expert, as with EP8 of the 671B: launches count.
    Case(
        name="bf16 4x4k 32 experts",
        arch=MANY_EXPERTS, num_micro_batches=4, optimizer=BF16_MOMENTS,
    ),
    Case(
        name="fp8 4x4k 32 experts",
        arch=MANY_EXPERTS, precision=FP8, num_micro_batches=4, optimizer=BF16_MOMENTS,
    ),
    Case(name="fp8 2x(2x4k)", precision=FP8, num_micro_batches=2, num_documents=2),
    Case(name="fp8 2x(2x4k) fastest", num_micro_batches=2, num_documents=2, **FASTEST_FP8),
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
    *(
        Case(
            name=f"whole model of {billions} B", arch=_whole(num_layers), num_micro_batches=4,
            memory=FULL, optimizer=BF16_STATES, kernels=FUSED_LOSS,
        )
        for num_layers, billions in ((18, 6.3), (20, 7.0), (22, 7.6))
    ),
    # 16 bytes of host memory for a parameter that is updated there: at most 110 GiB.
    *(
        Case(
            name=f"whole model of {billions} B, {percent}% of the states on the host",
            arch=_whole(num_layers), num_micro_batches=4, memory=FULL, kernels=FUSED_LOSS,
            optimizer=OptimizerSection(offload_fraction=percent / 100, gradients="bf16"),
        )
        for num_layers, billions, percent in ((22, 7.6, 50), (28, 9.5, 77))
    ),
]  # fmt: skip

Runs = Mapping[str, Callable[[Groups, int], Measured]]
"""What measures a case, by its name, in so many steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to measure, and where to write it."""

    only: Sequence[str] = ()
    """Names of cases, `*` for any part of one; none: all."""
    steps: int = 10
    """Measured after the warm-up."""
    profile: Sequence[str] = ()
    """Names of cases of which one step is taken apart by kind of kernel."""
    limit_gib: float | None = None
    """Memory of the GPU that may be allocated, to see what fits a smaller card; None: all."""
    json: Path | None = None
    picture: Path | None = None


@dataclass(frozen=True, slots=True)
class Results:
    """Of one run on one card."""

    about: Mapping[str, Any]
    """Device, versions, the roof."""
    measured: Sequence[Measured]
    failed: Mapping[str, str]
    """Why a case could not be measured, by its name."""
    profiles: Mapping[str, Mapping[str, float]]
    """Milliseconds by kind of kernel."""


def run(request: Request, console: Console, *, peers: Runs | None = None) -> Results:
    """Measures, shows and writes.

    Args:
        request: What to measure.
        console: One line a case, as it is done, and a table at the end.
        peers: Other trainers of the same slice, measured after the cases.

    Raises:
        ValueError: A name fits no case, or there is no GPU.
    """
    runs = {**case_runs(CASES), **(peers or {})}
    chosen = choose(runs, request.only)
    profiled = {case.name: case for case in CASES if case.name in choose(runs, request.profile)}
    if not torch.cuda.is_available():
        raise ValueError(
            "no GPU is visible: the cases are slices of DeepSeek-V3 for a card of 80 GB; "
            "`python benchmarks/layouts.py` trains a small model on CPUs"
        )
    for path in filter(None, (request.json, request.picture)):
        path.parent.mkdir(parents=True, exist_ok=True)
    groups = start(Parallel(), device_of("cuda"))
    try:
        if request.limit_gib is not None:
            limit_memory(request.limit_gib, groups.device)
        results = measure(
            {name: runs[name] for name in chosen},
            profiled if request.profile else {},
            groups,
            request.steps,
            lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
        )
    finally:
        stop()
    console.print(_table(results))
    if request.json:
        request.json.write_text(json.dumps(asdict(results), indent=1) + "\n")
    if request.picture:
        draw(results, request.picture)
    return results


def limit_memory(limit_gib: float, device: torch.device) -> None:
    """Lets this process allocate no more than that; what does not fit fails as on such a card.

    Raises:
        ValueError: The card has less.
    """
    total = torch.cuda.get_device_properties(device).total_memory
    if limit_gib * GIB > total:
        raise ValueError(
            f"--limit-gib {limit_gib:g} exceeds the {total / GIB:.1f} GiB of this GPU; leave it out"
        )
    torch.cuda.set_per_process_memory_fraction(limit_gib * GIB / total, device)


def case_runs(cases: Sequence[Case]) -> Runs:
    """Each case measured by itself."""
    return {case.name: partial(_measure, case) for case in cases}


def _measure(case: Case, groups: Groups, num_steps: int) -> Measured:
    return bench.measure(case, groups, num_steps=num_steps)


def choose(names: Mapping[str, Any], patterns: Sequence[str]) -> list[str]:
    """The names that fit any pattern, in their own order; all where there is no pattern.

    Raises:
        ValueError: A pattern fits none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no case is called {pattern!r}; there are: {', '.join(names)}")
    return [name for name in names if not patterns or any(fnmatchcase(name, p) for p in patterns)]


def measure(
    runs: Runs,
    profiled: Mapping[str, Case],
    groups: Groups,
    num_steps: int,
    tell: Callable[[str], None],
) -> Results:
    """Case by case; one that fails (out of memory) costs none of the others."""
    roof = bench.gemm_roof_tflops(groups.device) if groups.device.type == "cuda" else 0.0
    measured, failed, profiles = [], {}, {}
    for name, measure_one in runs.items():
        try:
            measured.append(replace(measure_one(groups, num_steps), name=name))
            tell(line(measured[-1], roof))
        except Exception as error:  # whatever kernels and libraries raise
            failed[name] = str(error).splitlines()[0] if str(error) else type(error).__name__
            tell(f"{name:36} failed: {failed[name][:150]}")
        bench.release()
    for name, case in profiled.items():
        prepared = bench.prepare(case, groups)
        profiles[name] = profile_step(prepared)
        bench.free(prepared.step.chunks, prepared.step.optimizer)
        bench.release()
    return Results(about(groups.device, roof), measured, failed, profiles)


def about(device: torch.device, roof: float) -> dict[str, Any]:
    """What the figures were taken on."""
    names = ("torch", "megatron-core", "transformer-engine")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "python": platform.python_version(),
        "bf16_gemm_roof_tflops": roof,
        **{name: _version(name) for name in names},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except ModuleNotFoundError:  # PackageNotFoundError is one
        return "not installed"


def line(got: Measured, roof: float) -> str:
    """One case in one line."""
    share = f" {got.tflops / roof:6.1%} of the roof" if roof else ""
    return (
        f"{got.name:36} {got.step_ms:7.1f} ms (fastest {got.fastest_ms:7.1f}) "
        f"{got.tokens_per_second:9,.0f} tokens/s {got.tflops:6.1f} TFLOP/s{share} "
        f"{got.peak_gib:5.1f} GiB"
    )


def _table(results: Results) -> Table:
    roof = results.about["bf16_gemm_roof_tflops"]
    table = Table(title=f"{results.about['device']}, bf16 GEMM roof {roof:.0f} TFLOP/s")
    table.add_column("case")
    for title in ("ms a step", "fastest", "tokens/s", "TFLOP/s", "MFU of the roof", "peak GiB"):
        table.add_column(title, justify="right")
    for got in results.measured:
        table.add_row(
            got.name,
            f"{got.step_ms:.1f}",
            f"{got.fastest_ms:.1f}",
            f"{got.tokens_per_second:,.0f}",
            f"{got.tflops:.0f}",
            f"{got.tflops / roof:.1%}" if roof else "",
            f"{got.peak_gib:.1f}",
        )
    for name, kinds in results.profiles.items():
        whole = sum(kinds.values())
        table.add_section()
        table.add_row(f"{name}: on the GPU", f"{whole:.1f}")
        for kind, ms in kinds.items():
            share = f"{ms / whole:.1%} of it" if whole else ""
            table.add_row(f"  {kind}", f"{ms:.1f}", "", share)
    return table


def draw(results: Results, path: Path) -> None:
    """Tokens/s of every case, peers in grey, and beside it the profiles."""
    import matplotlib.pyplot as plt  # a second and 100 MB that only a picture needs

    panels = 2 if results.profiles else 1
    kinds = list(dict.fromkeys(kind for profile in results.profiles.values() for kind in profile))
    height = 1.2 + 0.32 * max(len(results.measured), len(kinds), 4)
    figure, axes = plt.subplots(
        1, panels, figsize=(6.5 * panels, height), layout="constrained", squeeze=False
    )
    bars, ours = axes[0][0], {case.name for case in CASES}
    bars.barh(
        [got.name for got in results.measured],
        [got.tokens_per_second for got in results.measured],
        color=["#1f6fb2" if got.name in ours else "#9a9a9a" for got in results.measured],
    )
    for row, got in enumerate(results.measured):
        label = f"  {got.step_ms:.0f} ms, {got.peak_gib:.0f} GiB"
        bars.text(got.tokens_per_second, row, label, va="center", fontsize=8)
    bars.margins(x=0.25)
    bars.set(xlabel="tokens/s", title=results.about["device"])
    if results.profiles:
        _bars_by_kind(axes[0][1], results.profiles, kinds)
    for one in axes[0]:
        one.invert_yaxis()
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars_by_kind(
    axes: Any, profiles: Mapping[str, Mapping[str, float]], kinds: Sequence[str]
) -> None:
    """A bar a kind of kernel, those of several profiles under one another."""
    thick = 0.8 / len(profiles)
    for number, (name, profile) in enumerate(profiles.items()):
        times = [profile.get(kind, 0.0) for kind in kinds]
        rows = [row + thick * (number - (len(profiles) - 1) / 2) for row in range(len(kinds))]
        axes.barh(rows, times, height=thick, label=f"{name}: {sum(times):.0f} ms")
        for row, time in zip(rows, times, strict=True):
            axes.text(time, row, f"  {time:.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.margins(x=0.15)
    axes.set(xlabel="ms on the GPU, one step", title="by kind of kernel")
    axes.legend(fontsize=8, loc="lower right", frameon=False)
