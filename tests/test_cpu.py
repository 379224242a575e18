"""Megatron-Core's CUDA calls on a CPU: each patch does what the call means there."""

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, get_cuda_rng_tracker
from megatron.core.transformer.moe import moe_utils, token_dispatcher

from megatron_dsv3.model import cpu
from megatron_dsv3.model.cpu_adam import FusedAdam

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def patched() -> None:
    cpu.enable()


@pytest.fixture
def tracker() -> CudaRNGStatesTracker:
    tracker = CudaRNGStatesTracker()
    tracker.add("a", 1)
    tracker.add("b", 2)
    return tracker


def test_patching_twice_is_patching_once():
    functions = torch.cuda.current_device, torch.cuda.Stream, CudaRNGStatesTracker.fork
    depth = torch.overrides._len_torch_function_stack()
    cpu.enable()
    assert (
        torch.cuda.current_device,
        torch.cuda.Stream,
        CudaRNGStatesTracker.fork,
    ) == functions
    assert torch.overrides._len_torch_function_stack() == depth


@pytest.mark.parametrize("device", ["cuda", "cuda:3", torch.device("cuda"), 0], ids=str)
def test_a_tensor_asked_for_on_a_gpu_is_made_on_the_cpu(device):
    made = [
        torch.zeros(2, device=device),
        torch.tensor([1.0], device=device),
        torch.arange(3, device=device),
        torch.zeros(2).to(device),
        torch.zeros(2).to(device=device),
        torch.zeros(2).to(device, torch.bfloat16),
        torch.empty_like(torch.zeros(2), device=device),
    ]
    assert {tensor.device for tensor in made} == {CPU}
    assert made[5].dtype is torch.bfloat16


def test_a_move_to_the_gpu_is_no_copy():
    tensor = torch.zeros(2)
    assert tensor.cuda() is tensor
    assert tensor.cuda(non_blocking=True) is tensor
    module = torch.nn.Linear(2, 2)
    weight = module.weight
    assert module.cuda().weight is weight
    assert module.to("cuda").weight is weight


def test_other_moves_and_casts_are_left_alone():
    assert torch.zeros(2, device="meta").is_meta
    assert torch.zeros(2).to("meta").is_meta
    assert torch.zeros(2).to(torch.bfloat16).dtype is torch.bfloat16
    assert torch.zeros(2).to(torch.ones(1, dtype=torch.int64)).dtype is torch.int64
    assert torch.zeros(2).type(torch.float64).dtype is torch.float64


def test_pinned_memory_is_plain_memory():
    assert not torch.empty(2, pin_memory=True).is_pinned()


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        (torch.zeros(1), "torch.cuda.FloatTensor"),
        (torch.zeros(1, dtype=torch.bfloat16), "torch.cuda.BFloat16Tensor"),
        (torch.zeros(1, device="meta"), "torch.cuda.FloatTensor"),
    ],
    ids=["fp32", "bf16", "meta"],
)
def test_types_have_the_names_by_which_megatron_sorts_parameters(tensor, name):
    assert tensor.type() == name


def test_streams_and_events_are_always_done():
    assert torch.cuda.current_device() == CPU
    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        event.record(stream)
        stream.wait_event(event)
        stream.wait_stream(torch.cuda.current_stream())
    context = torch.cuda.stream(stream)
    for _ in range(2):  # gradient buffers re-enter one context
        with context:
            torch.zeros(1).record_stream(stream)
    assert event.query()
    assert stream.record_event(event) is event
    assert isinstance(stream.record_event(), torch.cuda.Event)
    torch.cuda.synchronize()
    event.synchronize()
    assert torch.cuda.memory_allocated() == torch.cuda.max_memory_allocated() == 0


def test_a_fork_draws_from_its_own_state_and_leaves_the_outer_one(tracker):
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    outer = [torch.rand(1)]
    with tracker.fork("a"):
        torch.rand(100)
    outer.append(torch.rand(3))
    assert torch.equal(torch.cat(outer), expected)


def test_a_second_fork_goes_on_where_the_first_stopped(tracker):
    drawn = {}
    for name in ("a", "b", "a"):
        with tracker.fork(name):
            drawn.setdefault(name, []).append(torch.rand(2))
    for name, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        for tensor in drawn[name]:
            assert torch.equal(tensor, torch.rand(2))


def test_a_fork_that_fails_restores_the_outer_state(tracker):
    @tracker.fork("a")
    def fail():
        torch.rand(1)
        raise RuntimeError("inside")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.equal(torch.get_rng_state(), before)


def test_seeding_seeds_the_cpu():
    torch.cuda.manual_seed(3)
    first = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), first)


def test_the_random_state_that_megatron_saves_for_a_gpu_is_that_of_the_cpu():
    from megatron.core.tensor_parallel import random as mcore_random

    for get, put in (
        (mcore_random._get_cuda_rng_state, mcore_random._set_cuda_rng_state),
        (torch.cuda.get_rng_state, torch.cuda.set_rng_state),
    ):
        state = get()
        first = torch.rand(2)
        put(state)
        assert torch.equal(torch.rand(2), first)


def test_recomputed_dropout_is_that_of_the_first_pass():
    """Megatron-Core's checkpoint saves and restores what it takes for the GPU's random state."""
    get_cuda_rng_tracker().reset()
    drawn = []

    def layer(x):
        dropped = torch.nn.functional.dropout(x, 0.5, training=True)
        drawn.append(dropped.detach())
        return dropped * x

    x = torch.ones(64, requires_grad=True)
    torch.manual_seed(1)
    tensor_parallel.checkpoint(layer, False, x).sum().backward()
    assert len(drawn) == 2
    assert torch.equal(*drawn)
    assert 0 < drawn[0].count_nonzero() < 64


def test_splits_of_an_all_to_all_are_plain_numbers():
    for module in (moe_utils, token_dispatcher):
        move = module.maybe_move_tensor_to_cpu
        splits = torch.tensor([3, 0, 5])
        assert move(splits, as_numpy=True).tolist() == [3, 0, 5]
        assert not isinstance(move(splits, as_numpy=True), torch.Tensor)
        assert move(splits, record_stream=True) is splits
        assert move(None, as_numpy=True) is None


def test_megatron_takes_our_adam_where_it_has_none_of_its_own():
    from megatron.core import optimizer
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.optimizer import distrib_optimizer

    if HAVE_TE:
        pytest.skip("Transformer Engine imports, and its FusedAdam stays")
    assert optimizer.Adam is distrib_optimizer.Adam is FusedAdam
    assert not optimizer.USING_PYTORCH_OPTIMIZER
    assert distrib_optimizer.USING_APEX_OPTIMIZER
