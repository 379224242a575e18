"""Clipping and AdamW in one pass over memory, by one Triton kernel (arXiv:1711.05101).

Same numbers as a pass that scales the gradients and Transformer Engine's FusedAdam after it: all
arithmetic in fp32, moments kept in fp32 or bf16, masters in fp32 or as a bf16 weight and the 16
bits that it lacks (`remainders`).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Elements of one program: 16 a thread, so that loads of bf16 are as wide as they can be."""


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """Of one update of one parameter group."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    corrections: tuple[float, float]
    """What the moments are divided by, as they began with zeros."""

    @classmethod
    def of(cls, group: dict[str, Any]) -> "Hyperparameters":
        """From a group of FusedAdam, whose `step` has been counted up."""
        beta1, beta2 = group["betas"]
        # Numbers even where a checkpoint brought tensors: Triton would take those for pointers.
        lr, eps, decay = (float(group[name]) for name in ("lr", "eps", "weight_decay"))
        step = int(group["step"])
        # Of betas in fp32, as the kernel has them: 1 - 0.999 is there another number by 1e-5 of
        # itself, which the first updates would not lose.
        first, second = (1.0 - float(np.float32(beta)) ** step for beta in (beta1, beta2))
        return cls(lr, beta1, beta2, eps, decay, (first, second))


def update(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    hyper: Hyperparameters,
    *,
    remainder: Tensor | None = None,
    factor: float = 1.0,
) -> None:
    """One step of AdamW in place; the gradient is left as it is.

    Args:
        parameter: fp32 masters; with a `remainder` bf16 weights. Any shape, contiguous, as all are.
        gradient: fp32 or bf16.
        exp_avg: First moments, fp32 or bf16.
        exp_avg_sq: Second moments, fp32 or bf16.
        hyper: Of the parameter's group.
        remainder: int16, what the weights lack of fp32.
        factor: Multiplies the gradient, as clipping does.

    Raises:
        ValueError: Tensors are not contiguous or differ in size.
    """
    tensors = [parameter, gradient, exp_avg, exp_avg_sq]
    tensors += [] if remainder is None else [remainder]
    size = parameter.numel()
    for tensor in tensors:
        if tensor.numel() != size or not tensor.is_contiguous():
            raise ValueError(
                f"expected contiguous tensors of {size} elements, "
                f"got {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
    if size == 0:
        return
    _adamw[(triton.cdiv(size, BLOCK),)](
        parameter,
        parameter if remainder is None else remainder,
        gradient,
        exp_avg,
        exp_avg_sq,
        size,
        factor,
        hyper.lr,
        hyper.beta1,
        hyper.beta2,
        *hyper.corrections,
        hyper.eps,
        hyper.weight_decay,
        has_remainder=remainder is not None,
        block=BLOCK,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _adamw(
    parameters: tl.tensor,
    remainders: tl.tensor,
    gradients: tl.tensor,
    exp_avgs: tl.tensor,
    exp_avg_sqs: tl.tensor,
    size: tl.tensor,
    factor: tl.tensor,
    lr: tl.tensor,
    beta1: tl.tensor,
    beta2: tl.tensor,
    correction1: tl.tensor,
    correction2: tl.tensor,
    eps: tl.tensor,
    weight_decay: tl.tensor,
    has_remainder: tl.constexpr,
    block: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < size
    gradient = tl.load(gradients + at, mask=inside, other=0.0).to(tl.float32) * factor
    exp_avg = tl.load(exp_avgs + at, mask=inside, other=0.0).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sqs + at, mask=inside, other=0.0).to(tl.float32)
    parameter = tl.load(parameters + at, mask=inside, other=0.0)
    if has_remainder:
        upper = parameter.to(tl.int16, bitcast=True).to(tl.int32) << 16
        lower = tl.load(remainders + at, mask=inside, other=0).to(tl.int32)
        master = (upper + lower).to(tl.float32, bitcast=True)
    else:
        master = parameter
    exp_avg = beta1 * exp_avg + (1.0 - beta1) * gradient
    exp_avg_sq = beta2 * exp_avg_sq + (1.0 - beta2) * gradient * gradient
    root = tl.sqrt_rn(tl.div_rn(exp_avg_sq, correction2)) + eps
    master -= lr * (tl.div_rn(tl.div_rn(exp_avg, correction1), root) + weight_decay * master)
    tl.store(exp_avgs + at, exp_avg.to(exp_avgs.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sqs + at, exp_avg_sq.to(exp_avg_sqs.dtype.element_ty), mask=inside)
    if has_remainder:
        bits = master.to(tl.int32, bitcast=True)
        lower = bits.to(tl.int16)  # the lower half, as the two's complement it is
        upper = (bits - lower.to(tl.int32)) >> 16
        tl.store(remainders + at, lower, mask=inside)
        tl.store(parameters + at, upper.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(parameters + at, master, mask=inside)
