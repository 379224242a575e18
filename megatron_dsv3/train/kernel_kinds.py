"""A training step's time on a GPU by kind of kernel."""

import re
from collections.abc import Iterable, Mapping

import torch

from megatron_dsv3.train.bench import WARM_UP_STEPS, Prepared

KINDS: Mapping[str, str] = {
    "attention": r"sdpa|fmha|flash|cudnn::fusion|dot_do_o",
    "matrix products": r"nvjet|gemm|cutlass|xmma|cublas|splitk",
    "optimizer, norm, clipping": r"multi_tensor|adam",
    "FP8 quantisation": r"quantize|cast_transpose|transpose_cast|amax|fp8|block_scal",
    "expert dispatch": r"permute|sort_chunks|chunk_sort|row_id_map|topk|radix|histogram|scatter",
    "rotation": r"rotary|rope",
    "norms": r"rmsnorm|layernorm|layer_norm",
    "loss": r"cross_entropy|softmax",
    "activations": r"silu|swiglu|sigmoid",
    "communication": r"nccl",
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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        prepared.one()
        torch.cuda.synchronize()
    kernels = (event for event in profiler.events() if event.device_type.name == "CUDA")
    return by_kind((event.name, event.self_device_time_total / 1e3) for event in kernels)
