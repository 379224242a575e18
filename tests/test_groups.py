"""Process groups: places in the grid by hand, sizes that don't fit, devices, seeds."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.model import cpu
from megatron_dsv3.model.groups import (
    Groups,
    SharedError,
    device_of,
    from_rank_0,
    leave_layout,
    raise_together,
    start,
    stop,
)

CPU = torch.device("cpu")


@pytest.fixture
def as_rank() -> Iterator[Callable[..., Groups]]:
    """Joins a world that is not there."""
    cpu.enable()
    stop()

    def join(parallel: Parallel, rank: int, world_size: int, **options: Any) -> Groups:
        stop()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        return start(parallel, CPU, **options)

    yield join
    stop()


@pytest.fixture
def alone(monkeypatch) -> Iterator[None]:
    cpu.enable()
    stop()
    monkeypatch.delenv("RANK", raising=False)
    yield
    stop()


def test_one_process_is_every_rank_zero(alone):
    groups = start(Parallel(), CPU)
    assert (groups.rank, groups.world_size, groups.dp_size) == (0, 1, 1)
    assert groups.device == CPU
    ranks = ("tp_rank", "pp_rank", "ep_rank", "etp_rank", "cp_rank", "dp_rank", "edp_rank")
    assert [getattr(groups, name) for name in ranks] == [0] * 7
    assert groups.collection.tp.size() == groups.collection.dp_cp.size() == 1


def test_a_layout_that_was_left_leaves_nothing_but_the_joined_processes(alone):
    start(Parallel(), CPU)
    first = len(dist.distributed_c10d._world.pg_map)
    for _ in range(2):
        leave_layout()
        assert dist.is_initialized()
        assert len(dist.distributed_c10d._world.pg_map) == 1 < first
        assert start(Parallel(), CPU).collection.tp.size() == 1
        assert len(dist.distributed_c10d._world.pg_map) == first


def test_places_in_the_grid_are_those_counted_by_hand(as_rank):
    """TP changes fastest, then CP, DP, PP; among experts ETP, EP, then their replicas, PP."""
    parallel = Parallel(tp_size=2, cp_size=2, pp_size=2, ep_size=4)
    for rank in range(16):
        groups = as_rank(parallel, rank, 16)
        assert (groups.rank, groups.world_size, groups.dp_size) == (rank, 16, 2)
        tp, cp, dp, pp = rank % 2, rank // 2 % 2, rank // 4 % 2, rank // 8
        found = (groups.tp_rank, groups.cp_rank, groups.dp_rank, groups.pp_rank)
        assert found == (tp, cp, dp, pp)
        ep, edp = rank % 4, rank // 4 % 2
        assert (groups.etp_rank, groups.ep_rank, groups.edp_rank) == (0, ep, edp)


def test_split_experts_have_a_place_of_their_own(as_rank):
    parallel = Parallel(tp_size=1, ep_size=2, etp_size=2)
    places = []
    for rank in range(8):
        groups = as_rank(parallel, rank, 8)
        assert (groups.tp_rank, groups.dp_rank, groups.dp_size) == (0, rank, 8)
        places.append((groups.etp_rank, groups.ep_rank, groups.edp_rank))
    assert places == [(e, p, d) for d in range(2) for p in range(2) for e in range(2)]


def test_communicators_have_the_sizes_of_the_layout(as_rank):
    parallel = Parallel(tp_size=2, cp_size=2, pp_size=2, ep_size=4)
    collection = as_rank(parallel, 5, 16).collection
    sizes = {"tp": 2, "cp": 2, "pp": 2, "ep": 4, "dp": 2, "dp_cp": 4, "tp_cp": 4, "tp_dp_cp": 8}
    assert {name: getattr(collection, name).size() for name in sizes} == sizes
    assert collection.expt_tp.size() == 1
    assert collection.expt_dp.size() == 2


def test_virtual_stages_are_announced(as_rank):
    as_rank(Parallel(pp_size=2, vpp_size=3), 0, 2)
    assert parallel_state.get_virtual_pipeline_model_parallel_world_size() == 3
    as_rank(Parallel(pp_size=2), 0, 2)
    assert parallel_state.get_virtual_pipeline_model_parallel_world_size() is None


@pytest.mark.parametrize(
    ("mtp_stage", "holders"), [(None, {0, 3}), (3, {0, 3}), (2, {0, 2}), (0, {0})], ids=str
)
def test_the_gradient_of_the_embedding_is_summed_over_the_stages_that_embed(
    as_rank, mtp_stage, holders
):
    """The first, and the one with MTP."""
    parallel = Parallel(pp_size=4)
    found = set()
    for rank in range(4):
        as_rank(parallel, rank, 4, mtp_stage=mtp_stage)
        if parallel_state.is_rank_in_embedding_group():
            found.add(rank)
            assert parallel_state.get_embedding_group().size() == len(holders)
    assert found == holders


def test_optimizer_instances_share_the_data_parallel_ranks_out(as_rank):
    as_rank(Parallel(tp_size=2, num_optimizer_instances=2), 5, 16)
    sizes = [
        parallel_state.get_data_parallel_group(
            with_context_parallel=True, partial_data_parallel=partial
        ).size()
        for partial in (False, True)
    ]
    assert sizes == [8, 4]


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (
            Parallel(tp_size=2, pp_size=2),
            r"world size 6 is not tp_size\(2\) \* pp_size\(2\) \* cp_size\(1\) \* dp",
        ),
        (
            Parallel(ep_size=4),
            r"world size 6 is not etp_size\(1\) \* ep_size\(4\) \* pp_size\(1\) \* edp",
        ),
    ],
)
def test_a_world_that_does_not_fit_is_refused_with_all_factors_and_left(as_rank, parallel, message):
    with pytest.raises(ValueError, match=message):
        as_rank(parallel, 0, 6)
    assert not dist.is_initialized()


def test_groups_stop_and_start_again_with_another_layout(as_rank):
    assert as_rank(Parallel(tp_size=2), 1, 2).tp_rank == 1
    stop()
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
    stop()  # twice does no harm
    assert as_rank(Parallel(), 1, 2).dp_rank == 1


def test_groups_can_be_laid_out_anew_in_a_world_that_stays(as_rank):
    as_rank(Parallel(tp_size=4), 3, 4)
    leave_layout()
    groups = start(Parallel(pp_size=4), CPU)
    assert (groups.tp_rank, groups.pp_rank) == (0, 3)


def _draws(seed: int, *, rank: int, parallel: Parallel) -> tuple[list[float], ...]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    start(parallel, CPU, seed=seed)
    drawn = [torch.rand(3).tolist()]
    for name in ("model-parallel-rng", get_expert_parallel_rng_tracker_name()):
        with get_cuda_rng_tracker().fork(name):
            drawn.append(torch.rand(3).tolist())
    stop()
    return tuple(drawn)


def test_the_seed_decides_what_is_random_and_ranks_that_split_a_tensor_draw_apart(alone):
    parallel = Parallel(tp_size=2, ep_size=2)
    first, again, other_seed, other_tp, other_dp = (
        _draws(seed, rank=rank, parallel=parallel)
        for seed, rank in ((7, 0), (7, 0), (8, 0), (7, 1), (7, 2))
    )
    assert first == again
    assert all(a != b for a, b in zip(first, other_seed, strict=True))
    same = [a == b for a, b in zip(first, other_tp, strict=True)]
    assert same == [True, False, False], "outside any fork, in split tensors, in experts"
    same = [a == b for a, b in zip(first, other_dp, strict=True)]
    assert same == [True, True, True], "a replica in another place must start out the same"


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == device_of("cpu") == CPU
    with pytest.raises(ValueError, match=r"device cuda: no CUDA device is visible; set train.devi"):
        device_of("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert device_of("cpu") == CPU
    assert device_of("cuda") == device_of("auto") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert device_of("cuda") == device_of("auto") == torch.device("cuda", 5)


def _problems_of(monkeypatch, problems: list[str]) -> None:
    def gather(gathered, _, group=None):
        gathered[:] = problems

    monkeypatch.setattr(dist, "all_gather_object", gather)


def test_what_every_rank_met_is_said_once(as_rank, monkeypatch):
    as_rank(Parallel(), 0, 3)
    _problems_of(monkeypatch, ["no config.json"] * 3)
    with pytest.raises(SharedError, match=r"^no config.json$"):
        raise_together("no config.json")


def test_what_some_ranks_met_is_said_with_their_numbers_on_all(as_rank, monkeypatch):
    as_rank(Parallel(), 1, 4)
    _problems_of(monkeypatch, ["shard 3 is truncated", "", "shard 3 is truncated", "disk is gone"])
    expected = r"^shard 3 is truncated \(ranks \[0, 2\]\); disk is gone \(ranks \[3\]\)$"
    with pytest.raises(SharedError, match=expected):
        raise_together("")


def test_no_problem_anywhere_raises_nothing(as_rank):
    as_rank(Parallel(), 0, 2)
    assert raise_together("") is None


def test_what_rank_0_gives_and_what_it_fails_at_is_everyones(monkeypatch):
    sent: list[object] = []

    def broadcast(objects, src, group):
        assert src == 0
        if dist.get_rank() == 0:
            sent[:] = objects
        objects[:] = sent

    def fail():
        raise FileNotFoundError("no chats.jsonl")

    monkeypatch.setattr(dist, "new_group", lambda backend, timeout: timeout)
    monkeypatch.setattr(dist, "destroy_process_group", lambda group=None: None)
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        assert from_rank_0(lambda rank=rank: f"from {rank}") == "from 0"
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        with pytest.raises(SharedError, match=r"^no chats.jsonl$"):
            from_rank_0(fail)
