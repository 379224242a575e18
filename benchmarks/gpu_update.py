"""Clipping and AdamW on a GPU: one kernel, Transformer Engine's two passes, and a copy beside them.

    python benchmarks/gpu_update.py [--millions 512] [--repeats 10]

Weights in bf16 with 16-bit remainders or masters in fp32, moments in fp32 or bf16; TB/s count what
an update must move, clipping included as if it were free.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dsv3.train.fused_update import FusedUpdate

TENSOR = 7168 * 4096  # the first product of one expert of DeepSeek-V3, gate and up
CLIP = 0.5
CASES = {
    # weights or masters, moments, bytes that a parameter moves
    "fp32 masters, fp32 moments": (torch.float32, torch.float32, 28),
    "remainders, fp32 moments": (torch.bfloat16, torch.float32, 28),
    "remainders, bf16 moments": (torch.bfloat16, torch.bfloat16, 20),
}


def main() -> None:
    """Prints one line a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=int, default=512, help="of parameters")
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    number = max(1, arguments.millions * 10**6 // TENSOR)
    gradients = [torch.randn(TENSOR, device="cuda") for _ in range(number)]
    size, repeats = number * TENSOR, arguments.repeats
    copied = torch.empty_like(gradients[0])
    ms = timed(lambda: [copied.copy_(gradient) for gradient in gradients], repeats)
    print(f"{'copy of the gradients':28} {ms:7.2f} ms {8 * size / ms / 1e9:5.2f} TB/s")
    for name, (dtype, moments, moved) in CASES.items():
        theirs = timed(partial(two_passes, adam_of(dtype, moments, gradients), gradients), repeats)
        ours = timed(FusedUpdate(adam_of(dtype, moments, gradients), CLIP), repeats)
        rate = moved * size / ours / 1e9
        print(
            f"{name:28} {ours:7.2f} ms {rate:5.2f} TB/s, Transformer Engine with clipping "
            f"{theirs:7.2f} ms: {theirs / ours:.2f} times as long"
        )


def adam_of(dtype: torch.dtype, moments: torch.dtype, gradients: list[Tensor]) -> Any:
    """Transformer Engine's, with these gradients set."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    parameters = [nn.Parameter(torch.randn(TENSOR, device="cuda").to(dtype)) for _ in gradients]
    has_remainders = dtype is torch.bfloat16
    for parameter, gradient in zip(parameters, gradients, strict=True):
        setattr(parameter, "decoupled_grad" if has_remainders else "grad", gradient)
    return FusedAdam(
        parameters, exp_avg_dtype=moments, exp_avg_sq_dtype=moments,
        master_weights=has_remainders, use_decoupled_grad=has_remainders,
        store_param_remainders=has_remainders,
    )  # fmt: skip


def two_passes(adam: Any, gradients: list[Tensor]) -> None:
    """As Megatron-Core clips and updates."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.optimizers import multi_tensor_applier

    overflow = torch.zeros(1, dtype=torch.int, device="cuda")
    multi_tensor_applier(tex.multi_tensor_scale, overflow, [gradients, gradients], 1.0)
    adam.step()


def timed(run: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of one, by the GPU's clock."""
    for _ in range(3):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    elapsed: float = start.elapsed_time(end)
    return elapsed / repeats


if __name__ == "__main__":
    main()
