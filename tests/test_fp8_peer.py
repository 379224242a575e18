"""The FP8 yardstick of the GPU tests is itself right: errors of e4m3 and e5m2, blocks by blocks."""

import pytest
import torch
import torch.nn.functional as F
from fp8_peer import linears_in_fp8

# Rounding to 3 and 2 bits of mantissa: uniform in a step of 1/8 (1/4) of a power of two.
E4M3, E5M2 = 0.026, 0.052


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def _products(recipe: str | None, spared: bool = False) -> list[torch.Tensor]:
    """y, and the gradients of x and w, in fp32."""
    torch.manual_seed(0)
    x, w = torch.randn(300, 260).bfloat16(), torch.randn(200, 260).bfloat16()
    x[:, :128] *= 1000  # a block of its own scale
    gradient = torch.randn(300, 200).bfloat16()
    x.requires_grad_()
    w.requires_grad_()
    if recipe is None:
        y = F.linear(x.float(), w.float())
        y.backward(gradient.float())
    else:
        with linears_in_fp8(recipe, spared=w if spared else x):
            y = F.linear(x, w)
        y.backward(gradient)
    return [t.detach().float() for t in (y, x.grad, w.grad)]


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise"])
def test_products_are_off_by_what_two_rounded_operands_cost(recipe):
    gradient = E4M3 if recipe == "blockwise" else E5M2
    wanted = [E4M3 * 2**0.5, (gradient**2 + E4M3**2) ** 0.5, (gradient**2 + E4M3**2) ** 0.5]
    for ours, theirs, error in zip(_products(recipe), _products(None), wanted, strict=True):
        assert _relative(ours, theirs) == pytest.approx(error, rel=0.15)


def test_blocks_keep_what_one_scale_for_the_tensor_loses():
    exact = _products(None)[2][:, 128:]
    errors = {r: _relative(_products(r)[2][:, 128:], exact) for r in ("blockwise", "tensorwise")}
    assert errors["tensorwise"] > 1.2 * errors["blockwise"]


def test_the_spared_weight_is_multiplied_in_bf16():
    assert _relative(_products("blockwise", spared=True)[0], _products(None)[0]) < 4e-3


def test_the_plain_function_is_back_afterwards():
    plain = F.linear
    with linears_in_fp8("blockwise", spared=torch.zeros(1)):
        assert F.linear is not plain
    assert F.linear is plain
