"""A training step's time on a GPU by kind of kernel."""

import re
from collections.abc import Iterable, Mapping

import torch

from megatron_dsv3.train.bench import WARM_UP_STEPS, Prepared

KINDS: Mapping[str, str] = {
    "communication": r"nccl",
    "attention": r"sdpa|fmha|flash|cudnn::fusion|dot_do_o",
    "matrix products": r"nvjet|gemm|cutlass|xmma|cublas|splitk",
    "optimizer, norm, clipping": r"multi_tensor|adam",
    "FP8 quantisation": r"quantize|cast_transpose|transpose_cast|amax|fp8|block_scal",
    "expert dispatch": r"permute|sort_chunks|chunk_sort|row_id_map|topk|radix|histogram|scatter",
    "rotation": r"rotary|rope",
    "norms": r"rmsnorm|layernorm|layer_norm",
    "loss": r"cross_entropy|softmax",
    "activations": r"silu|swiglu|sigmoid",
    "copies and fills": r"memcpy|memset|copy|fill|cat",
}
"""What a kernel's name holds, the first that fits; matched without regard to case."""
OTHER = "other"


def kind_of(kernel: str) -> str:
    """The kind of one kernel, by its name."""
    return next((k for k, names in KINDS.items() if re.search(names, kernel, re.IGNORECASE)), OTHER)


def by_kind(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Sums times of (name, time) by kind, the longest first."""
    sums: dict[str, float] = {}
    for name, time in kernels:
        kind = kind_of(name)
        sums[kind] = sums.get(kind, 0.0) + time
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def profile_step(prepared: Prepared) -> dict[str, float]:
    """Milliseconds on the GPU of one step after the warm-up, by kind; needs a GPU."""
    for _ in range(WARM_UP_STEPS):
        prepared.one()
    return by_kind((name, end - start) for name, start, end in trace_step(prepared))


def exposed(kernels: Iterable[tuple[str, float, float]]) -> float:
    """How long nothing but communication ran, of (name, start, end) on all streams of a device."""
    changes = []  # (time, of which kind, one more or one fewer)
    for name, start, end in kernels:
        is_other = kind_of(name) != "communication"
        changes += [(start, is_other, 1), (end, is_other, -1)]
    running, alone, before = [0, 0], 0.0, 0.0
    for time, is_other, change in sorted(changes):
        if running[False] and not running[True]:
            alone += time - before
        running[is_other] += change
        before = time
    return alone


def trace_step(prepared: Prepared) -> list[tuple[str, float, float]]:
    """Name, start and end in ms of each kernel of one step, which is warm; needs a GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        prepared.one()
        torch.cuda.synchronize()
    return [
        (event.name, event.time_range.start / 1e3, event.time_range.end / 1e3)
        for event in profiler.events()
        if event.device_type.name == "CUDA"
    ]
