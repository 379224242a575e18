"""transformers' model with its linear layers rounded to FP8 by torch's own float8, as a yardstick.

Every operand of the three products of a linear layer is rounded as the recipe says and multiplied
in fp32, so what is off is what FP8 must cost, whoever computes it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Rounding = Callable[[Tensor], Tensor]
_BLOCK = 128


def _blocks(x: Tensor, rows: int) -> Tensor:
    """fp32 `x` [m, n] in e4m3 with a power of two for each `rows` x 128 block, dequantised.

    DeepSeek-V3's report 3.3.2: 1x128 for activations and gradients, 128x128 for weights.
    """
    m, n = x.shape
    padded = F.pad(x.float(), (0, -n % _BLOCK, 0, -m % rows))
    tiles = padded.unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, rows))
    amax = tiles.abs().amax((1, 3), keepdim=True)
    scale = torch.where(amax > 0, torch.exp2(torch.floor(torch.log2(448 / amax))), 1.0)
    rounded = (tiles * scale).to(torch.float8_e4m3fn).float() / scale
    return rounded.flatten(0, 1).flatten(1, 2)[:m, :n]


def _whole(x: Tensor, dtype: torch.dtype) -> Tensor:
    """One scale for the tensor."""
    amax = x.float().abs().max()
    scale = torch.where(amax > 0, torch.finfo(dtype).max / amax, 1.0)
    return (x.float() * scale).to(dtype).float() / scale


def _e4m3(x: Tensor) -> Tensor:
    return _whole(x, torch.float8_e4m3fn)


_ROUNDINGS: dict[str, tuple[Rounding, Rounding, Rounding]] = {
    "blockwise": (lambda x: _blocks(x, 1), lambda w: _blocks(w, _BLOCK), lambda g: _blocks(g, 1)),
    "tensorwise": (_e4m3, _e4m3, lambda g: _whole(g, torch.float8_e5m2)),
}


class _Product(torch.autograd.Function):
    """x [..., n] @ w [m, n]^T, each operand rounded along the axis that is summed over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, recipe: str) -> Tensor:
        activation, weight, _ = _ROUNDINGS[recipe]
        ctx.save_for_backward(x, w)
        ctx.recipe = recipe
        product = activation(x.flatten(0, -2)) @ weight(w).T
        return product.to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        x, w = ctx.saved_tensors
        activation, weight, gradient = _ROUNDINGS[ctx.recipe]
        flat = outputs[0].flatten(0, -2)
        to_x = (gradient(flat) @ weight(w)).to(x.dtype).view(x.shape)
        to_w = (gradient(flat.T) @ activation(x.flatten(0, -2).T).T).to(w.dtype)
        return to_x, to_w, None


@contextmanager
def linears_in_fp8(recipe: str, *, spared: Tensor) -> Iterator[None]:
    """Every `F.linear` in bf16 but with the weight `spared` (the head), in FP8.

    Routers multiply in fp32 and stay as they are.
    """
    plain = F.linear

    def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        if w.dtype is not torch.bfloat16 or w is spared:
            return plain(x, w, bias)
        assert bias is None
        return _Product.apply(x, w, recipe)

    F.linear = linear
    try:
        yield
    finally:
        F.linear = plain
