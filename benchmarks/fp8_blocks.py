"""Speed of block FP8 on one core, beside whole-tensor broadcasting in the same run.

    OMP_NUM_THREADS=1 python benchmarks/fp8_blocks.py [--repeats 5]

Both sides compute bit-equal results; shapes are those of the 671B.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_dsv3.convert.fp8 import BLOCK, dequantize, quantize

SHAPES = {
    "expert up": (2048, 7168),
    "expert down": (7168, 2048),
    "o_proj": (7168, 16384),
    "kv_a_proj": (576, 7168),
}


def broadcast(weight: Tensor, scale_inv: Tensor) -> Tensor:
    """What a straightforward port does: scales blown up to the tensor's size, one fp32 product."""
    rows, columns = weight.shape
    scales = scale_inv.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return (weight.float() * scales[:rows, :columns]).bfloat16()


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` runs after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    """Prints one line a shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread; GB/s of BF16")
    print(
        f"{'tensor':12} {'shape':>14} {'dequantise':>11} {'broadcast':>10} {'x':>5} {'quantise':>9}"
    )
    for name, shape in SHAPES.items():
        original = torch.randn(shape, dtype=torch.bfloat16)
        fp8, scale_inv = quantize(original)
        out = torch.empty_like(original)
        assert torch.equal(dequantize(fp8, scale_inv), broadcast(fp8, scale_inv))
        gigabytes = out.nbytes / 1e9
        ours = gigabytes / seconds(partial(dequantize, fp8, scale_inv, out=out), repeats)
        theirs = gigabytes / seconds(partial(broadcast, fp8, scale_inv), repeats)
        back = gigabytes / seconds(partial(quantize, original, out=fp8), repeats)
        size = "x".join(map(str, shape))
        print(f"{name:12} {size:>14} {ours:10.2f} {theirs:10.2f} {ours / theirs:5.1f} {back:9.2f}")


if __name__ == "__main__":
    main()
