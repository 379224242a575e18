"""The simulated pipeline against Megatron-Core's schedule functions, and against hand counts."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from megatron.core.pipeline_parallel import schedules

from megatron_dsv3.plan.schedule import (
    MAX_SIMULATED_GROUPS,
    Costs,
    Task,
    counts_at_peak,
    in_flight_at_peak,
    order,
    peak_in_flight,
    simulate,
)

LAYOUTS = [(2, 1, 5), (4, 1, 8), (4, 1, 2), (8, 1, 16), (2, 2, 4), (4, 2, 8), (4, 4, 8), (8, 2, 8)]


class Model(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model_type = None


class Communicator:
    """Every message arrives at once and empty: only the order of the passes is of interest."""

    def __init__(self, config, rank, size, vpp_size):
        self.config = config
        self.pp_group = SimpleNamespace(size=lambda: size, rank=lambda: rank)
        self.virtual_pipeline_model_parallel_size = vpp_size if vpp_size > 1 else None
        self.total_stages, self.current_stage = size, rank
        self.is_pp_first_stage, self.is_pp_last_stage = rank == 0, rank == size - 1

    def recv_forward(self, *args, **kwargs):
        return torch.zeros(1)

    recv_backward = send_forward_recv_backward = send_backward_recv_forward = recv_forward

    def send_forward(self, *args, **kwargs):
        return None

    send_backward = send_forward

    def send_forward_recv_forward(self, *args, overlap_p2p_comm=False, **kwargs):
        return (torch.zeros(1), None) if overlap_p2p_comm else torch.zeros(1)

    send_backward_recv_backward = send_forward_recv_forward

    def send_forward_backward_recv_forward_backward(self, *args, **kwargs):
        return torch.zeros(1), torch.zeros(1)


def passes_of_megatron(monkeypatch, pp_rank, pp_size, vpp_size, num_micro_batches) -> list[Task]:
    """What Megatron-Core's schedule function computes on one stage, in its order."""
    config = SimpleNamespace(
        overlap_p2p_comm=vpp_size > 1, batch_p2p_comm=vpp_size == 1, timers=None,
        finalize_model_grads_func=None, no_sync_func=None, grad_sync_func=None,
        param_sync_func=None, hidden_size=1, sequence_parallel=False, calculate_per_token_loss=True,
        microbatch_group_size_per_vp_stage=pp_size, overlap_moe_expert_parallel_comm=False,
        num_microbatches_with_partial_activation_checkpoints=None, variable_seq_lengths=False,
        overlap_p2p_comm_warmup_flush=False, deallocate_pipeline_outputs=False,
        virtual_pipeline_model_parallel_size=vpp_size,
    )  # fmt: skip
    models = [Model(config) for _ in range(vpp_size)]
    passes: list[Task] = []
    waiting: dict[int, list[int]] = {chunk: [] for chunk in range(vpp_size)}

    def forward_step(*args, current_microbatch, vp_stage=0, **kwargs):
        passes.append(Task(True, vp_stage, current_microbatch))
        waiting[vp_stage].append(current_microbatch)
        return torch.full((1,), float(vp_stage)), torch.zeros([], dtype=torch.int)

    def backward_step(input_tensor, output_tensor, output_tensor_grad, config):
        chunk = int(output_tensor)
        passes.append(Task(False, chunk, waiting[chunk].pop(0)))
        return torch.zeros(1)

    monkeypatch.setattr(schedules, "forward_step", forward_step)
    monkeypatch.setattr(schedules, "backward_step", backward_step)
    zeros = torch.zeros
    monkeypatch.setattr(
        schedules.torch, "zeros", lambda *a, **k: zeros(*a, **{**k, "device": "cpu"})
    )
    one = SimpleNamespace(size=lambda: 1)
    interleaved = vpp_size > 1
    function = (
        schedules.forward_backward_pipelining_with_interleaving
        if interleaved
        else schedules.forward_backward_pipelining_without_interleaving
    )
    if not interleaved:
        monkeypatch.setattr(schedules, "get_tensor_shapes", lambda **_: [(1,)])
        monkeypatch.setattr(schedules, "ProcessGroupCollection", SimpleNamespace)
    function(
        forward_step_func=None, data_iterator=[None] * vpp_size, model=models,
        num_microbatches=num_micro_batches, seq_length=1, micro_batch_size=1,
        p2p_communicator=Communicator(config, pp_rank, pp_size, vpp_size),
        pg_collection=SimpleNamespace(tp=one, cp=one),
    )  # fmt: skip
    return passes


@pytest.mark.parametrize(("pp_size", "vpp_size", "num_micro_batches"), LAYOUTS)
def test_every_stage_computes_in_megatrons_order(monkeypatch, pp_size, vpp_size, num_micro_batches):
    for pp_rank in range(pp_size):
        theirs = passes_of_megatron(monkeypatch, pp_rank, pp_size, vpp_size, num_micro_batches)
        ours = order(
            pp_rank, pp_size=pp_size, vpp_size=vpp_size, num_micro_batches=num_micro_batches
        )
        assert ours == theirs, f"stage {pp_rank}"
        assert len(ours) == 2 * vpp_size * num_micro_batches


@pytest.mark.parametrize(("pp_size", "vpp_size", "num_micro_batches"), LAYOUTS)
def test_megatrons_schedule_holds_as_many_micro_batches(
    monkeypatch, pp_size, vpp_size, num_micro_batches
):
    for pp_rank in range(pp_size):
        in_flight = peak = 0
        for task in passes_of_megatron(monkeypatch, pp_rank, pp_size, vpp_size, num_micro_batches):
            in_flight += 1 if task.is_forward else -1
            peak = max(peak, in_flight)
        tasks = order(
            pp_rank, pp_size=pp_size, vpp_size=vpp_size, num_micro_batches=num_micro_batches
        )
        assert peak_in_flight(tasks, [1.0] * vpp_size) == peak, f"stage {pp_rank}"


@pytest.mark.parametrize(
    ("pp_size", "vpp_size", "num_micro_batches"), [each for each in LAYOUTS if each[1] > 1]
)
def test_overlapping_all_to_alls_put_one_forward_more_before_the_first_backward(
    pp_size, vpp_size, num_micro_batches
):
    for pp_rank in range(pp_size):
        total, _, num_warmup, _ = schedules.get_pp_rank_microbatches(
            num_micro_batches,
            vpp_size,
            pp_size,
            overlap_moe_expert_parallel_comm=True,
            p2p_communicator=Communicator(None, pp_rank, pp_size, vpp_size),
        )
        tasks = order(
            pp_rank,
            pp_size=pp_size,
            vpp_size=vpp_size,
            num_micro_batches=num_micro_batches,
            num_ahead=1,
        )
        first = [task.is_forward for task in tasks].index(False)
        # In the steady state a forward comes before each backward.
        assert first == min(num_warmup + 1, total), f"stage {pp_rank}"
        assert len(set(tasks)) == len(tasks) == 2 * total


def test_one_stage_holds_two_micro_batches_where_all_to_alls_overlap():
    """Megatron-Core's combined_1f1b_schedule_for_no_pipelining computes F0 F1+B0 F2+B1 ... ."""
    sizes = {"pp_size": 1, "vpp_size": 1, "num_micro_batches": 4}
    told = [(task.is_forward, task.micro_batch) for task in order(0, **sizes, num_ahead=1)]
    assert told[:4] == [(True, 0), (True, 1), (False, 0), (True, 2)]
    for num_ahead, held in ((0, 1), (1, 2)):
        assert in_flight_at_peak(0, (1.0,), **sizes, num_ahead=num_ahead) == (held,)


def test_stage_r_of_1f1b_holds_p_minus_r_micro_batches():
    for rank in range(8):
        tasks = order(rank, pp_size=8, vpp_size=1, num_micro_batches=32)
        assert peak_in_flight(tasks, [1.0]) == 8 - rank
        assert counts_at_peak(tasks, [2.5]) == (8 - rank,)


def test_the_heavier_chunk_decides_when_memory_peaks():
    tasks = order(0, pp_size=2, vpp_size=2, num_micro_batches=4)
    early, late = counts_at_peak(tasks, [10.0, 1.0]), counts_at_peak(tasks, [1.0, 10.0])
    assert early[0] >= late[0]
    assert late[1] >= early[1]
    assert peak_in_flight(tasks, [10.0, 1.0]) == 10 * early[0] + early[1]


def test_even_stages_have_the_bubble_of_the_textbook():
    # Narayanan et al. 2021: (p - 1) passes forward and backward, a v-th of it with v chunks.
    for vpp_size in (1, 2, 4):
        costs = Costs(
            forward=[1.0 / vpp_size] * 4 * vpp_size, backward=[2.0 / vpp_size] * 4 * vpp_size
        )
        timeline = simulate(costs, pp_size=4, vpp_size=vpp_size, num_micro_batches=16)
        assert timeline.seconds == pytest.approx(16 * 3 + 3 * 3 / vpp_size)
        assert timeline.bubble == pytest.approx(3 * 3 / vpp_size)


def test_the_slowest_stage_sets_the_pace():
    costs = Costs(forward=[1, 1, 3, 1], backward=[2, 2, 6, 2])
    timeline = simulate(costs, pp_size=4, vpp_size=1, num_micro_batches=100)
    assert timeline.seconds == pytest.approx(100 * 9 + 2 + 1 + 4, abs=6)
    assert timeline.busy == pytest.approx([300, 300, 900, 300])


@pytest.mark.parametrize(("vpp_size", "overlapped"), [(1, False), (2, True), (2, False)])
def test_many_micro_batches_are_worked_out_from_few(vpp_size, overlapped):
    costs = Costs(
        forward=[1.0, 1.3, 0.9, 1.1] * vpp_size, backward=[2.1, 2.4, 1.9, 2.6] * vpp_size, hop=0.1,
        overlapped_hops=overlapped,
    )  # fmt: skip
    many = 4 * (MAX_SIMULATED_GROUPS + 9)
    short = simulate(costs, pp_size=4, vpp_size=vpp_size, num_micro_batches=many)
    whole = simulate(costs, pp_size=4, vpp_size=vpp_size, num_micro_batches=many, whole=True)
    assert len(short.events) < len(whole.events)
    assert short.seconds == pytest.approx(whole.seconds, rel=2e-3)
    assert short.busy == pytest.approx(whole.busy)


def test_a_message_costs_each_pass_along_the_pipeline():
    for overlapped in (False, True):
        costs = Costs(forward=[1] * 4, backward=[1] * 4, hop=0.5, overlapped_hops=overlapped)
        timeline = simulate(costs, pp_size=4, vpp_size=1, num_micro_batches=1)
        assert timeline.seconds == 8 + 6 * 0.5
    one = simulate(
        Costs(forward=[1], backward=[2], hop=9.0), pp_size=1, vpp_size=1, num_micro_batches=5
    )
    assert one.seconds == 15


def test_no_stage_computes_two_things_at_once_and_none_before_its_input():
    costs = Costs(forward=[1, 2, 1, 2], backward=[3, 1, 3, 1], hop=0.25)
    timeline = simulate(costs, pp_size=2, vpp_size=2, num_micro_batches=4, whole=True)
    ends = {(e.task.is_forward, e.task.chunk * 2 + e.pp_rank, e.task.micro_batch): e.end
            for e in timeline.events}  # fmt: skip
    for rank in range(2):
        mine = [event for event in timeline.events if event.pp_rank == rank]
        assert all(a.end <= b.start for a, b in itertools.pairwise(mine))
    for event in timeline.events:
        chunk = event.task.chunk * 2 + event.pp_rank
        if event.task.is_forward and chunk:
            assert event.start >= ends[True, chunk - 1, event.task.micro_batch] + 0.25
        if not event.task.is_forward and chunk < 3:
            assert event.start >= ends[False, chunk + 1, event.task.micro_batch] + 0.25
