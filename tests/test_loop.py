"""The loop with a stand-in for the step: records, their order, and what an error closes."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_dsv3.config.sections import ScheduleSection
from megatron_dsv3.train import loop
from megatron_dsv3.train.loop import Run, StepBatch, train
from megatron_dsv3.train.metrics import StepRecord
from megatron_dsv3.train.optimizer import build_schedule
from megatron_dsv3.train.spikes import NonFiniteError
from megatron_dsv3.train.step import Counts, Losses, StepResult

NUM_STEPS, WORLD_SIZE = 3, 4


class Step:
    """Gives the micro-batches' content back as the loss."""

    def __init__(self, *, fails_at: int = 0, error: Exception | None = None) -> None:
        self.fails_at, self.error, self.number = fails_at, error, 0

    guard = SimpleNamespace(num_skipped=0)
    experts = SimpleNamespace(loads=lambda: {0: [1, 2]})
    settled = False

    def settle(self) -> None:
        self.settled = True

    def __call__(self, micro_batches: Any, *, lr_fraction: float) -> StepResult:
        assert 0 < lr_fraction <= 1
        self.number += 1
        if self.number == self.fails_at:
            raise self.error
        counts = Counts(torch.tensor([30.0, 20.0]), documents=2, tokens=100 * self.number)
        return StepResult(Losses(float(sum(micro_batches)), 0.5), 2.0, counts, 1.25)


class Recorder:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.closed = 0

    def log_expert_load(self, step: int, loads: Any) -> None:
        assert loads == {0: [1, 2]}

    def log(self, record: StepRecord) -> None:
        assert not self.closed
        self.records.append(record)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def clock(monkeypatch) -> None:
    """Every step takes two seconds."""
    times = iter(range(0, 100, 2))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: next(times)))


def _run(step: Step | None = None, **changes: Any) -> Run:
    optimizer = SimpleNamespace(param_groups=[{"params": [], "default_config": True}])
    section = ScheduleSection(decay="linear", warmup_steps=1)
    values = {
        "step": step or Step(),
        "schedule": build_schedule(
            section, optimizer, max_lr=1.0, weight_decay=0.0, num_steps=NUM_STEPS
        ),
        "optimizer": optimizer,
        "groups": SimpleNamespace(world_size=WORLD_SIZE, device=torch.device("cpu")),
        "num_steps": NUM_STEPS,
        "flops_per_token": 8e9,
        "max_lr": 1.0,
        **changes,
    }
    return Run(**values)


def _batches() -> Iterator[StepBatch]:
    for number in range(1, NUM_STEPS + 1):
        yield StepBatch(micro_batches=[number, 0.5], epoch=number / 2)


def test_records_by_hand(clock):
    records = train(_run(), _batches())
    assert records == [
        StepRecord(
            step=number,
            num_steps=3,
            epoch=number / 2,
            loss=number + 0.5,
            mtp_loss=0.5,
            lr=lr,
            grad_norm=2.0,
            seconds=2,
            tokens=100 * number,
            counted_tokens=30,
            num_devices=WORLD_SIZE,
            mfu=None,
            tflops_per_device=8e9 * 100 * number / 2 / WORLD_SIZE / 1e12,
            peak_memory_gib=None,
            expert_balance=1.25,
        )
        # The rate that the step was taken with, not the one that comes next.
        for number, lr in ((1, 0.5), (2, 1.0), (3, 0.5))
    ]


def test_sinks_and_callbacks_get_every_record_and_sinks_are_closed_once():
    sinks, seen = [Recorder(), Recorder()], []
    records = train(_run(sinks=sinks, on_step=[seen.append]), _batches())
    assert len(records) == NUM_STEPS
    assert seen == records
    for sink in sinks:
        assert sink.records == records
        assert sink.closed == 1


def test_a_callback_sees_the_schedule_already_moved_on():
    """What it saves is the state from which the next step goes on."""
    steps = []
    run = _run()
    run = _run(
        schedule=run.schedule,
        optimizer=run.optimizer,
        on_step=[lambda record: steps.append((record.step, run.schedule.num_steps))],
    )
    train(run, _batches())
    assert steps == [(1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("kind", [NonFiniteError, ValueError])
def test_a_step_that_fails_is_named_and_the_sinks_are_closed(kind):
    sink, seen = Recorder(), []
    run = _run(Step(fails_at=2, error=kind("samples a")), sinks=[sink], on_step=[seen.append])
    with pytest.raises(kind, match=r"^step 2: samples a$") as raised:
        train(run, _batches())
    assert type(raised.value) is kind
    assert [record.step for record in sink.records] == [record.step for record in seen] == [1]
    assert sink.closed == 1
    assert run.schedule.num_steps == 1


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_other_errors_pass_as_they_are_and_close_the_sinks(error):
    sink = Recorder()
    with pytest.raises(type(error)) as raised:
        train(_run(Step(fails_at=1, error=error), sinks=[sink]), _batches())
    assert raised.value is error
    assert sink.closed == 1


def test_an_error_while_reading_the_data_closes_the_sinks():
    def broken() -> Iterator[StepBatch]:
        yield StepBatch(micro_batches=[1], epoch=0.1)
        raise OSError("disk is gone")

    sink = Recorder()
    with pytest.raises(OSError, match="disk is gone"):
        train(_run(sinks=[sink]), broken())
    assert len(sink.records) == sink.closed == 1


def test_no_batches_are_no_steps():
    sink = Recorder()
    assert train(_run(sinks=[sink]), []) == []
    assert sink.closed == 1


def test_memory_is_the_peak_of_this_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    assert loop._peak_memory_gib(torch.device("cuda", 1)) == 1.5
    assert loop._peak_memory_gib(torch.device("cpu")) is None
