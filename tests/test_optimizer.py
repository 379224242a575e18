"""Schedule by hand; clipping and AdamW against torch's; a non-finite gradient changes nothing."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dsv3.config.architecture import DEEPSEEK_V3
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import OptimizerSection, ScheduleSection
from megatron_dsv3.model.build import build_chunks, wrap
from megatron_dsv3.model.config import mcore_config
from megatron_dsv3.model.groups import SharedError
from megatron_dsv3.train import optimizer as module
from megatron_dsv3.train.optimizer import (
    build_optimizer,
    build_schedule,
    clip_and_update,
    gradient_norm,
    optimizer_config,
)
from megatron_dsv3.train.spikes import NonFiniteError

ARCH = replace(
    DEEPSEEK_V3, vocab_size=64, hidden_size=32, num_layers=2, num_dense_layers=1, num_heads=2,
    ffn_hidden_size=32, moe_ffn_hidden_size=16, q_lora_rank=16, kv_lora_rank=16, qk_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, num_experts=4, num_experts_per_token=2, num_groups=2,
    num_groups_per_token=1, num_mtp_layers=0,
)  # fmt: skip
LR = 0.1


def _update(optimizer):
    norm = gradient_norm(optimizer)
    clip_and_update(optimizer, norm)
    return norm


@dataclass(frozen=True)
class Trainee:
    """A model in fp32 behind its data-parallel wrapper, and what updates it."""

    model: Any
    optimizer: Any

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.model.parameters())

    def set_gradients(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.main_grad.copy_(value)

    def state(self) -> list[Tensor]:
        """Copies of weights, moments and steps."""
        parts = [part.optimizer for part in self.optimizer.chained_optimizers]
        moments = [t for part in parts for state in part.state.values() for t in state.values()]
        steps = [torch.tensor(g.get("step", 0)) for part in parts for g in part.param_groups]
        return [t.detach().clone() for t in (*self.parameters, *moments, *steps)]


@pytest.fixture
def make(groups) -> Callable[..., Trainee]:
    def build(**section: Any) -> Trainee:
        config = mcore_config(ARCH, Parallel(), dtype=torch.float32, device=groups.device)
        chunks = build_chunks(
            ARCH, Parallel(), groups, config, max_seq_length=8, transformer_engine=False
        )
        generator = torch.Generator().manual_seed(0)
        for parameter in chunks[0].parameters():
            parameter.data.normal_(generator=generator)
        (wrapped,) = wrap(chunks, config)
        options = OptimizerSection(lr=LR, **section)
        return Trainee(wrapped, build_optimizer(options, [wrapped], dtype=torch.float32))

    return build


def _gradients(parameters: list[torch.nn.Parameter], scale: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [scale * torch.randn(p.shape, generator=generator) for p in parameters]


# Update


@pytest.mark.parametrize(
    "section",
    [
        {"clip_grad": 1.0},
        {"clip_grad": 0.0},
        {"clip_grad": 3.0, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3},
    ],
    ids=str,
)
def test_updates_are_those_of_torch_with_its_clipping(make, section):
    """Gradients above and below the limit; dense weights, experts and router in one norm."""
    trainee = make(**section)
    reference = [torch.nn.Parameter(p.detach().clone()) for p in trainee.parameters]
    decayed = [p for p in reference if p.dim() > 1]  # Megatron-Core spares norms from decay
    spared = [p for p in reference if p.dim() == 1]
    options = OptimizerSection(lr=LR, **section)
    constant = ScheduleSection(decay="constant", warmup_steps=0)
    # It also tells the groups their weight decay.
    build_schedule(
        constant, trainee.optimizer, max_lr=LR, weight_decay=options.weight_decay, num_steps=4
    )
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": options.weight_decay}, {"params": spared}],
        lr=LR,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        weight_decay=0.0,
    )
    for scale in (0.5, 1e-4, 0.02, 1e-3):
        gradients = _gradients(trainee.parameters, scale)
        trainee.set_gradients(gradients)
        for parameter, gradient in zip(reference, gradients, strict=True):
            parameter.grad = gradient.clone()
        limit = options.clip_grad or math.inf
        expected = torch.nn.utils.clip_grad_norm_(reference, limit).item()
        adamw.step()
        assert _update(trainee.optimizer) == pytest.approx(expected, rel=1e-5)
    for (name, ours), theirs in zip(trainee.model.named_parameters(), reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("decoupled", [False, True])
def test_gradients_are_clipped_wherever_the_optimizer_keeps_them(groups, decoupled):
    """Beside bf16 moments, or masters on the host, they are not in `.grad`."""
    parameter, seen = torch.nn.Parameter(torch.zeros(2)), []
    name = "decoupled_grad" if decoupled else "grad"
    part = SimpleNamespace(
        config=SimpleNamespace(
            clip_grad=1.0, use_precision_aware_optimizer_no_fp8_or_ds_fp8=decoupled
        ),
        get_parameters=lambda: [parameter],
        optimizer=None,
    )
    chained = SimpleNamespace(
        chained_optimizers=[part],
        prepare_grads=lambda: setattr(parameter, name, torch.tensor([3.0, 4.0])),
        get_grad_norm=lambda: 5.0,
        step_with_ready_grads=lambda: seen.append(getattr(parameter, name).clone()),
    )
    assert _update(chained) == 5.0
    torch.testing.assert_close(seen, [torch.tensor([0.6, 0.8])])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["experts.linear_fc2.weight1", "output_layer", "layernorm.weight"])
def test_a_gradient_that_is_not_finite_shows_before_anything_changes(make, bad, name):
    trainee = make(weight_decay=0.1)
    trainee.set_gradients(_gradients(trainee.parameters, 1.0))
    _update(trainee.optimizer)
    before = trainee.state()
    assert len(before) > 3 * len(trainee.parameters)
    trainee.set_gradients(_gradients(trainee.parameters, 1.0))
    hit = next(p for n, p in trainee.model.named_parameters() if name in n)
    hit.main_grad.view(-1)[-1] = bad
    assert not math.isfinite(gradient_norm(trainee.optimizer))
    assert all(torch.equal(a, b) for a, b in zip(before, trainee.state(), strict=True))
    trainee.set_gradients(_gradients(trainee.parameters, 1.0))
    assert math.isfinite(_update(trainee.optimizer))


def test_a_non_finite_gradient_is_an_error_of_all_ranks():
    """The norm is a sum over all, so every rank raises alike."""
    assert issubclass(NonFiniteError, SharedError)


def test_masters_of_bf16_weights_are_fp32(groups):
    """A step too small for bf16 is not lost."""
    config = mcore_config(ARCH, Parallel(), dtype=torch.bfloat16, device=groups.device)
    chunks = build_chunks(
        ARCH, Parallel(), groups, config, max_seq_length=8, transformer_engine=False
    )
    for parameter in chunks[0].parameters():
        parameter.data.fill_(1.0)
    (wrapped,) = wrap(chunks, config)
    optimizer = build_optimizer(OptimizerSection(lr=1e-3), [wrapped], dtype=torch.bfloat16)
    for _ in range(6):
        for parameter in wrapped.parameters():
            assert parameter.dtype is torch.bfloat16
            assert parameter.main_grad.dtype is torch.float32
            parameter.main_grad.fill_(1e-3)
        _update(optimizer)
    # Six steps of 1e-3 from 1.0, where bf16 next below 1 is 0.99609: each alone would round away.
    assert {p.flatten()[0].item() for p in wrapped.parameters()} == {0.9921875}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, {}),
        (
            {"moments": "bf16"},
            {
                "use_precision_aware_optimizer": True,
                "exp_avg_dtype": torch.bfloat16,
                "exp_avg_sq_dtype": torch.bfloat16,
            },
        ),
        (
            {"offload_fraction": 0.5},
            {
                "use_precision_aware_optimizer": True,
                "optimizer_cpu_offload": True,
                "optimizer_offload_fraction": 0.5,
                "overlap_cpu_optimizer_d2h_h2d": True,
            },
        ),
    ],
    ids=str,
)
def test_states_are_kept_as_the_job_says(monkeypatch, section, expected):
    """A GPU's business: Megatron-Core refuses some of it without Transformer Engine."""
    monkeypatch.setattr(module, "OptimizerConfig", dict)
    model = SimpleNamespace(fp8=None, fp8_recipe=None)
    config = optimizer_config(OptimizerSection(**section), model, dtype=torch.bfloat16)
    default = optimizer_config(OptimizerSection(), model, dtype=torch.bfloat16)
    assert {k: v for k, v in config.items() if k not in default or v != default[k]} == expected


# Schedule


def _rates(section: ScheduleSection, num_steps: int, *, max_lr: float = 1.0) -> list[float]:
    """The rate that each step is taken with, and the one left after the last."""
    optimizer = SimpleNamespace(param_groups=[{"params": []}])
    schedule = build_schedule(
        section, optimizer, max_lr=max_lr, weight_decay=0.1, num_steps=num_steps
    )
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(1)
    return [*rates, optimizer.param_groups[0]["lr"]]


def _cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


def test_cosine_by_hand():
    rates = _rates(ScheduleSection(decay="cosine", warmup_steps=2, min_lr=0.1), 6)
    decay = [0.1 + 0.9 * _cosine(share) for share in (0, 0.25, 0.5, 0.75, 1.0)]
    assert rates == pytest.approx([1 / 3, 2 / 3, *decay])
    assert decay[0] == 1.0
    assert decay[2] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)


def test_linear_by_hand():
    rates = _rates(ScheduleSection(decay="linear", warmup_steps=1, min_lr=0.2), 5)
    assert rates == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_constant_by_hand():
    rates = _rates(ScheduleSection(decay="constant", warmup_steps=3), 6, max_lr=0.4)
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4])


def test_without_warm_up_the_first_step_has_the_full_rate():
    rates = _rates(ScheduleSection(decay="linear", warmup_steps=0), 4)
    assert rates == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


@pytest.mark.parametrize(
    ("fraction", "num_steps", "warmup"), [(0.03, 100, 3), (0.03, 10, 1), (0.0, 10, 0), (0.5, 5, 3)]
)
def test_a_fraction_is_rounded_up_to_whole_steps(fraction, num_steps, warmup):
    rates = _rates(ScheduleSection(decay="constant", warmup_fraction=fraction), num_steps)
    assert rates.index(1.0) == warmup
    assert rates[:warmup] == pytest.approx([(k + 1) / (warmup + 1) for k in range(warmup)])


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("section", [{"warmup_steps": 50}, {"warmup_fraction": 1.0}], ids=str)
def test_a_warm_up_longer_than_the_run_reaches_the_full_rate_at_its_last_step(
    decay, num_steps, section
):
    rates = _rates(ScheduleSection(decay=decay, **section), num_steps)[:-1]
    assert rates == pytest.approx([(k + 1) / num_steps for k in range(num_steps)])
    assert rates[0] > 0


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_schedule_reaches_the_optimizer_and_ends_at_min_lr(make, decay):
    """Megatron-Core's parameter groups bring bounds that go before the schedule's."""
    optimizer = make().optimizer
    section = ScheduleSection(decay=decay, warmup_steps=1, min_lr=0.02)
    schedule = build_schedule(section, optimizer, max_lr=LR, weight_decay=0.3, num_steps=4)
    assert {group["lr"] for group in optimizer.param_groups} == {LR / 2}
    schedule.step(4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
        [0.02] * len(optimizer.param_groups)
    )


def test_weight_decay_is_constant_and_spares_norms(make):
    optimizer = make(weight_decay=0.3).optimizer
    schedule = build_schedule(
        ScheduleSection(), optimizer, max_lr=LR, weight_decay=0.3, num_steps=4
    )
    for _ in range(4):
        for group in optimizer.param_groups:
            dims = {p.dim() for p in group["params"]}
            assert group["weight_decay"] == (0.0 if group["wd_mult"] == 0 else 0.3), dims
        schedule.step(1)
    assert {group["wd_mult"] for group in optimizer.param_groups} == {0.0, 1.0}
