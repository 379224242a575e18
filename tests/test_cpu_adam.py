"""AdamW for CPUs against torch's own, which it replaces where Megatron-Core restores its state."""

import pytest
import torch

from megatron_dsv3.model.cpu_adam import FusedAdam

SHAPES = [(7, 5), (5,), (2, 3, 4)]


def _parameters(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES
    ]


def _set_gradients(parameters, step: int) -> None:
    """The same for parameters of the same shapes; their size grows and shrinks over the steps."""
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = (gradient * 10.0 ** (step % 5 - 2)).to(parameter.dtype)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"betas": (0.8, 0.95), "eps": 1e-3},
        {"betas": (0.0, 0.5), "weight_decay": 0.01},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str
)
def test_a_hundred_steps_are_those_of_torch(options, dtype, tolerance):
    ours, theirs = _parameters(dtype), _parameters(dtype)
    optimizers = [
        FusedAdam(ours, lr=0.05, **options),
        torch.optim.AdamW(theirs, lr=0.05, **{"weight_decay": 0.0, **options}),
    ]
    for step in range(100):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            _set_gradients(parameters, step)
            optimizer.step()
    start = _parameters(dtype)
    for mine, reference, before in zip(ours, theirs, start, strict=True):
        assert (reference - before).abs().max() > 0.1
        torch.testing.assert_close(mine, reference, rtol=tolerance, atol=tolerance)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                optimizers[0].state[mine][name],
                optimizers[1].state[reference][name],
                rtol=10 * tolerance,
                atol=tolerance,
            )


def test_each_group_follows_its_own_rate_which_a_schedule_may_change():
    ours, theirs = _parameters(), _parameters()

    def groups(parameters):
        return [
            {"params": parameters[:1], "lr": 0.01, "weight_decay": 0.3},
            {"params": parameters[1:], "lr": 0.2},
        ]

    mine = FusedAdam(groups(ours))
    reference = torch.optim.AdamW(groups(theirs), weight_decay=0.0)
    for step in range(10):
        for parameters, optimizer in ((ours, mine), (theirs, reference)):
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
            _set_gradients(parameters, step)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_parameter_without_a_gradient_stays_as_it_is():
    parameters = _parameters()
    before = parameters[1].detach().clone()
    optimizer = FusedAdam(parameters, lr=0.1, weight_decay=0.5)
    _set_gradients(parameters, 0)
    parameters[1].grad = None
    optimizer.step()
    assert torch.equal(parameters[1], before)
    assert parameters[1] not in optimizer.state
    assert parameters[0] in optimizer.state


def test_state_is_what_the_distributed_optimizer_saves():
    """Two moments a parameter, and the step in the group, where it need not be sharded."""
    parameters = _parameters()
    optimizer = FusedAdam(parameters)
    for step in range(3):
        _set_gradients(parameters, step)
        optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [3]
    assert all(state.keys() == {"exp_avg", "exp_avg_sq"} for state in optimizer.state.values())


def test_training_goes_on_from_restored_state_as_if_it_had_not_stopped():
    straight, resumed = _parameters(), _parameters()
    first, stopped = FusedAdam(straight, lr=0.05), FusedAdam(resumed, lr=0.05)
    for step in range(6):
        if step == 3:
            saved = stopped.state_dict()
            stopped = FusedAdam(resumed, lr=0.05)
            stopped.load_state_dict(saved)
        for parameters, optimizer in ((straight, first), (resumed, stopped)):
            _set_gradients(parameters, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_a_group_without_parameters_counts_no_step():
    """Megatron-Core keeps such groups on ranks that hold none of a kind."""
    optimizer = FusedAdam([{"params": _parameters()}, {"params": []}])
    optimizer.step()
    assert [group.get("step", 0) for group in optimizer.param_groups] == [1, 0]


def test_coupled_weight_decay_is_refused():
    with pytest.raises(ValueError, match="adam_w_mode=False is not supported"):
        FusedAdam(_parameters(), adam_w_mode=False)
