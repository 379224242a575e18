"""Optimizer states in host memory: where gradients arrive, and with how many threads they are used.

What needs a GPU is in test_gpu_training.py.
"""

import os

import pytest
import torch

from megatron_dsv3.train.host_states import (
    ALIGNMENT,
    all_threads,
    in_blocks,
    pinned_like,
    share_of_processors,
)


def test_blocks_of_powers_of_two_are_filled_and_what_is_larger_is_alone():
    assert in_blocks([3, 10, 4, 25, 6, 1], 16) == [[3], [1, 4], [2, 0, 5]]
    assert in_blocks([16] * 5, 16) == [[0], [1], [2], [3], [4]]
    assert in_blocks([], 16) == []


def test_a_place_for_each_gradient_and_none_shared():
    masters = [torch.empty(n, dtype=torch.float32) for n in (1000, 7, 16, 3000)]
    places = pinned_like(masters)
    for number, (place, master) in enumerate(zip(places, masters, strict=True)):
        assert (place.shape, place.dtype) == (master.shape, master.dtype)
        assert place.data_ptr() % ALIGNMENT == 0
        place.fill_(number)
    assert [set(place.tolist()) for place in places] == [{0.0}, {1.0}, {2.0}, {3.0}]
    assert len({place.untyped_storage().data_ptr() for place in places}) < 4


@pytest.mark.parametrize(("beside", "share"), [(None, 12), ("4", 3), ("5", 2), ("64", 1)])
def test_processors_are_shared_with_the_processes_of_this_host(monkeypatch, beside, share):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if beside:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", beside)
    assert share_of_processors() == share


@pytest.mark.parametrize(("before", "inside"), [(1, 3), (8, 8)])
def test_threads_are_as_before_afterwards(monkeypatch, before, inside):
    """A user who asks for more has more."""
    monkeypatch.setattr("megatron_dsv3.train.host_states.share_of_processors", lambda: 3)
    at_start = torch.get_num_threads()
    torch.set_num_threads(before)
    try:
        with all_threads():
            assert torch.get_num_threads() == inside
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(at_start)
