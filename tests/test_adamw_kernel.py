"""The kernel that clips and updates, run by Triton's interpreter, against torch's own AdamW.

tests/test_gpu_update.py compares it with Transformer Engine's on a GPU.
"""

import importlib
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from megatron_dsv3.train.fused_update import FusedUpdate, fuse_updates
from megatron_dsv3.train.optimizer import clip_factor
from megatron_dsv3.train.remainders import join, split

LR, BETAS, EPS, DECAY, FACTOR, NUM_STEPS = 1e-2, (0.9, 0.95), 1e-8, 0.1, 0.37, 4
SIZE = 3001  # of two programs, the second not full
KERNEL = "megatron_dsv3.train.adamw_kernel"


@pytest.fixture(scope="module")
def kernel():
    """The module with its kernel interpreted."""
    pytest.importorskip("triton", reason="this torch was built without Triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.delitem(sys.modules, KERNEL, raising=False)
        yield importlib.import_module(KERNEL)
        sys.modules.pop(KERNEL)


def _gradients(size: int = SIZE) -> list[Tensor]:
    """Of very different lengths, as those of a model are."""
    generator = torch.Generator().manual_seed(1)
    scale = 10.0 ** torch.empty(size).uniform_(-7, 1, generator=generator)
    return [torch.randn(size, generator=generator) * scale for _ in range(NUM_STEPS)]


def _weights(size: int = SIZE) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(2))


def _of_torch(gradients: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Masters and moments in float64."""
    master = nn.Parameter(_weights().double())
    adamw = torch.optim.AdamW([master], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for gradient in gradients:
        master.grad = gradient.double() * FACTOR
        adamw.step()
    state = adamw.state[master]
    return master.detach(), state["exp_avg"], state["exp_avg_sq"]


def _hyper(kernel, step: int):
    group = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "step": step}
    return kernel.Hyperparameters.of(group)


@pytest.mark.parametrize("has_remainder", [False, True], ids=["masters", "remainders"])
def test_an_update_is_that_of_torchs_adamw(kernel, has_remainder):
    master, exp_avg, exp_avg_sq = _of_torch(_gradients())
    weight, remainder = split(_weights()) if has_remainder else (_weights(), None)
    ours = torch.zeros(SIZE), torch.zeros(SIZE)
    for number, gradient in enumerate(_gradients()):
        kept = gradient.clone()
        kernel.update(
            weight, gradient, *ours, _hyper(kernel, number + 1), remainder=remainder, factor=FACTOR
        )
        assert torch.equal(gradient, kept)
    whole = join(weight, remainder) if has_remainder else weight
    torch.testing.assert_close(whole.double(), master, rtol=2e-7, atol=1e-5 * LR)
    # Gradients of either sign cancel: what fp32 can hold goes by their lengths.
    lengths = _of_torch([gradient.abs() for gradient in _gradients()])[1]
    assert ((ours[0] - exp_avg).abs() <= 1e-6 * lengths).all()
    torch.testing.assert_close(ours[1].double(), exp_avg_sq, rtol=1e-6, atol=1e-30)


def test_the_first_moments_are_corrected_by_what_they_were_multiplied_by(kernel):
    group = {"lr": LR, "betas": (0.9, 0.999), "eps": EPS, "weight_decay": DECAY, "step": 1}
    corrections = kernel.Hyperparameters.of(group).corrections
    in_fp32 = [float(1 - torch.tensor(beta, dtype=torch.float32)) for beta in (0.9, 0.999)]
    assert corrections == pytest.approx(in_fp32, rel=1e-7)


def test_rates_and_steps_of_a_checkpoint_may_be_tensors(kernel):
    group = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "step": 3}
    tensors = {**group, "lr": torch.tensor(LR, dtype=torch.float64), "step": torch.tensor(3)}
    assert kernel.Hyperparameters.of(tensors) == kernel.Hyperparameters.of(group)
    assert type(kernel.Hyperparameters.of(tensors).corrections[0]) is float


def test_a_weight_with_remainder_has_every_bit_of_an_fp32_master(kernel):
    whole, (weight, remainder) = _weights(), split(_weights())
    kept, rounded = [[torch.zeros(SIZE), torch.zeros(SIZE)] for _ in range(2)]
    for number, gradient in enumerate(_gradients()):
        hyper = _hyper(kernel, number + 1)
        kernel.update(whole, gradient, *kept, hyper)
        kernel.update(weight, gradient, *rounded, hyper, remainder=remainder)
    assert torch.equal(join(weight, remainder), whole)
    # What the model computes with is within half a last place of it.
    torch.testing.assert_close(weight.float(), whole, rtol=2**-8, atol=0)


def test_bf16_moments_are_those_of_fp32_in_the_precision_of_bf16(kernel):
    """Triton's interpreter cuts bits off where a GPU rounds, so they are compared closely there."""
    weight, gradient, hyper = _weights(), _gradients()[0], _hyper(kernel, 1)
    halves = [torch.randn(SIZE).abs().bfloat16() for _ in range(2)]
    whole = [half.float() for half in halves]
    expected = weight.clone()
    kernel.update(expected, gradient, *whole, hyper)
    kernel.update(weight, gradient, *halves, hyper)
    assert torch.equal(weight, expected)
    for half, exact in zip(halves, whole, strict=True):
        torch.testing.assert_close(half.float(), exact, rtol=2**-7, atol=0)


def test_bf16_gradients_are_taken_as_they_are(kernel):
    gradient, hyper = _gradients()[0].bfloat16(), _hyper(kernel, 1)
    results = []
    for given in (gradient, gradient.float()):
        weight, moments = _weights(), (torch.zeros(SIZE), torch.zeros(SIZE))
        kernel.update(weight, given, *moments, hyper)
        results.append(torch.stack([weight, *moments]))
    assert torch.equal(*results)


@pytest.mark.parametrize("has_remainder", [False, True], ids=["masters", "remainders"])
def test_it_compiles_for_hopper_with_the_widest_loads_and_stores(monkeypatch, has_remainder):
    """Triton needs no GPU for that, and its interpreter takes what the compiler does not."""
    triton = pytest.importorskip("triton", reason="this torch was built without Triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delitem(sys.modules, KERNEL, raising=False)
    module = importlib.import_module(KERNEL)
    parameter, moment = ("*bf16", "*bf16") if has_remainder else ("*fp32", "*fp32")
    signature = {
        "parameters": parameter,
        "remainders": "*i16" if has_remainder else parameter,
        "gradients": "*fp32",
        "exp_avgs": moment,
        "exp_avg_sqs": moment,
        "size": "i64",
        **dict.fromkeys(("factor", "lr", "beta1", "beta2", "correction1", "correction2"), "fp32"),
        "eps": "fp32",
        "weight_decay": "fp32",
        "has_remainder": "constexpr",
        "block": "constexpr",
    }
    source = ASTSource(
        module._adamw,
        signature,
        {"has_remainder": has_remainder, "block": module.BLOCK},
        {(position,): [["tt.divisibility", 16]] for position in range(6)},
    )
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    widths = set(re.findall(r"(?:ld|st)\.global\.(\S+)", code))
    assert widths == {"v4.b32"}


@pytest.mark.parametrize("odd", ["size", "strides"])
def test_tensors_that_do_not_fit_are_refused_and_left_alone(kernel, odd):
    weight, moments = torch.ones(8), (torch.zeros(8), torch.zeros(8))
    gradient = torch.ones(7) if odd == "size" else torch.ones(16)[::2]
    with pytest.raises(ValueError, match="expected contiguous tensors of 8 elements"):
        kernel.update(weight, gradient, *moments, _hyper(kernel, 1))
    assert torch.equal(weight, torch.ones(8))


class Adam:
    """What FusedUpdate asks of Transformer Engine's."""

    capturable = False
    use_decoupled_grad = True

    def __init__(self, *groups: list[nn.Parameter], remainders: bool) -> None:
        hyper = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
        self.param_groups = [{"params": list(group), **hyper} for group in groups]
        self.master_weights = self.store_param_remainders = remainders
        self.exp_avg_dtype = self.exp_avg_sq_dtype = torch.float32
        self.state = {p: {} for group in groups for p in group}

    def initialize_state(self, parameter: nn.Parameter, has_remainder: bool) -> None:
        zeros = torch.zeros(parameter.numel())
        self.state[parameter] = {"exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        if has_remainder:
            self.state[parameter]["master_param"] = zeros.to(torch.int16)

    def step(self) -> None:
        raise AssertionError("Transformer Engine's")


def _chained(*adams: Adam):
    return SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=adam) for adam in adams])


def test_every_parameter_with_a_gradient_is_updated_and_every_group_counts(kernel):
    weights = [nn.Parameter(_weights().bfloat16()) for _ in range(2)]
    before = weights[0].detach().clone()
    adam = Adam([], weights, remainders=True)
    fuse_updates(_chained(adam))
    assert isinstance(adam.step, FusedUpdate)
    weights[0].decoupled_grad = _gradients()[0]
    adam.step.factor = 0.0
    adam.step()
    assert [group["step"] for group in adam.param_groups] == [1, 1]
    # With a gradient of nothing, decay alone moves the master.
    master = join(weights[0].detach(), adam.state[weights[0]]["master_param"])
    torch.testing.assert_close(master, before.float() * (1 - LR * DECAY))
    assert torch.equal(weights[1], before)
    assert not adam.state[weights[1]]


def test_states_of_another_kind_keep_their_own_step():
    fp32_with_remainders = Adam([nn.Parameter(_weights())], remainders=True)
    fp16 = Adam([nn.Parameter(_weights())], remainders=False)
    fp16.exp_avg_dtype = torch.float16
    captured = Adam([nn.Parameter(_weights())], remainders=False)
    captured.capturable = True
    plain = torch.optim.AdamW([nn.Parameter(_weights())])
    known = Adam([nn.Parameter(_weights())], remainders=False)
    others = [fp32_with_remainders, fp16, captured, plain]
    fuse_updates(_chained(*others, known))
    assert [isinstance(adam.step, FusedUpdate) for adam in [*others, known]] == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("norm", "clip_grad", "factor"), [(4.0, 1.0, 0.25), (0.5, 1.0, 1.0), (4.0, 0.0, 1.0)]
)
def test_the_factor_brings_the_norm_down_to_what_is_allowed(norm, clip_grad, factor):
    assert clip_factor(norm, clip_grad) == pytest.approx(factor, rel=1e-6)
