"""Clipping and AdamW by one kernel, against Transformer Engine's two on a GPU.

`make test-gpu` runs all `gpu` tests in one process: starting takes most of a minute.
"""

import pytest
import torch
from torch import Tensor, nn

from megatron_dsv3.train.fused_update import FusedUpdate, is_known
from megatron_dsv3.train.remainders import join

pytestmark = pytest.mark.gpu

LR, CLIP, NUM_STEPS = 1e-3, 0.37, 5
SIZES = (2048 * 3, 1, 4097, 1_000_003)
KINDS = {
    "fp32 masters": (torch.float32, torch.float32, torch.float32),
    "fp32 masters, bf16 moments": (torch.float32, torch.bfloat16, torch.float32),
    "remainders": (torch.bfloat16, torch.float32, torch.float32),
    "remainders, bf16 moments": (torch.bfloat16, torch.bfloat16, torch.float32),
    "remainders, bf16 moments and gradients": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
}


def _adam(weights: list[Tensor], moments: torch.dtype):
    from transformer_engine.pytorch.optimizers import FusedAdam

    has_remainders = weights[0].dtype is torch.bfloat16
    return FusedAdam(
        [{"params": [nn.Parameter(weight.clone()) for weight in weights]}],
        lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
        exp_avg_dtype=moments, exp_avg_sq_dtype=moments,
        master_weights=has_remainders, use_decoupled_grad=has_remainders,
        store_param_remainders=has_remainders,
    )  # fmt: skip


def _set_gradients(adam, gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(adam.param_groups[0]["params"], gradients, strict=True):
        setattr(parameter, "decoupled_grad" if adam.use_decoupled_grad else "grad", gradient)


def _masters(adam) -> Tensor:
    found = []
    for parameter in adam.param_groups[0]["params"]:
        remainder = adam.state[parameter].get("master_param")
        found.append(parameter.data if remainder is None else join(parameter.data, remainder))
    return torch.cat(found)


def _moments(adam, name: str) -> Tensor:
    return torch.cat([adam.state[p][name].float() for p in adam.param_groups[0]["params"]])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_an_update_is_that_of_transformer_engine_after_clipping(kind):
    dtype, moments, gradient_dtype = kind
    generator = torch.Generator("cuda").manual_seed(1)
    randn = lambda size: torch.randn(size, device="cuda", generator=generator)  # noqa: E731
    weights = [randn(size).to(dtype) for size in SIZES]
    theirs, ours = (_adam(weights, moments) for _ in range(2))
    assert is_known(ours)
    ours.step = FusedUpdate(ours, CLIP)
    for _ in range(NUM_STEPS):
        gradients = [(1e-2 * randn(size) ** 3).to(gradient_dtype) for size in SIZES]
        _set_gradients(ours, gradients)
        ours.step()
        _set_gradients(theirs, [(g.float() * CLIP).to(gradient_dtype) for g in gradients])
        theirs.step()
    moved = _masters(ours) - torch.cat(weights).float()
    assert float(moved.abs().max()) > LR
    # A gradient in bf16 is rounded once more where clipping is a pass of its own; so is its square,
    # by twice as much. A moment in bf16 now and then falls on the other side of a half.
    rounding = 0.0 if gradient_dtype is torch.float32 else 2.0**-8
    whole, half = (1e-6, 2e-6) if moments is torch.float32 else (1e-4, 2.0**-7)
    for name, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        got, expected = _moments(ours, name), _moments(theirs, name)
        apart = got - expected
        assert apart.abs().max() <= (half + power * rounding) * expected.abs().max(), name
        assert apart.norm() <= (whole + power * rounding) * expected.norm(), name
    apart = (_masters(ours) - _masters(theirs)).norm() / moved.norm()
    assert apart < (1e-5 if moments is torch.float32 else 1e-3) + rounding


def test_bf16_moments_are_those_of_fp32_rounded_to_nearest():
    size = SIZES[-1]
    randn = lambda: torch.randn(size, device="cuda")  # noqa: E731
    weight, gradient, halves = randn(), [randn()], [randn().abs().bfloat16() for _ in range(2)]
    results = []
    for kept in (torch.bfloat16, torch.float32):
        adam = _adam([weight], kept)
        (parameter,) = adam.param_groups[0]["params"]
        adam.initialize_state(parameter, False)
        for name, half in zip(("exp_avg", "exp_avg_sq"), halves, strict=True):
            adam.state[parameter][name].copy_(half)
        _set_gradients(adam, gradient)
        FusedUpdate(adam, CLIP)()
        results.append((adam.state[parameter], parameter.data))
    (rounded, ours), (exact, theirs) = results
    assert torch.equal(ours, theirs)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(rounded[name], exact[name].bfloat16())
