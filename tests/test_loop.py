"""The loop with a stand-in for the step: records, their order, and what an error closes."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_dsv3.config.sections import ScheduleSection, SpikesSection
from megatron_dsv3.train import loop
from megatron_dsv3.train.loop import Run, StepBatch, train
from megatron_dsv3.train.metrics import StepRecord
from megatron_dsv3.train.optimizer import build_schedule
from megatron_dsv3.train.spikes import NonFiniteError
from megatron_dsv3.train.step import Counts, Losses, StepResult

NUM_STEPS, WORLD_SIZE = 3, 4


class Step:
    """Gives the micro-batches' content back as the loss."""

    def __init__(
        self, *, fails_at: int = 0, error: Exception | None = None, skips: str | None = None
    ) -> None:
        self.fails_at, self.error, self.skips, self.number = fails_at, error, skips, 0
        self.guard = SimpleNamespace(num_skipped=0, section=SpikesSection())
        self.experts = SimpleNamespace(loads=lambda: {3: [self.number, 2]})
        self.lr_fractions: list[float] = []
        self.settled_after: list[int] = []

    def settle(self) -> None:
        self.settled_after.append(self.number)

    def __call__(self, micro_batches: Any, *, lr_fraction: float) -> StepResult:
        self.lr_fractions.append(lr_fraction)
        self.number += 1
        if self.number == self.fails_at:
            raise self.error
        self.guard.num_skipped += self.skips is not None
        counts = Counts(
            torch.tensor([30.0, 20.0]), documents=2, tokens=100 * self.number, squares=9
        )
        losses = Losses(float(sum(micro_batches)), 0.5)
        return StepResult(losses, 2.0, counts, 1.25, self.skips)


class Recorder:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.loads: list[tuple[int, Any]] = []
        self.closed = 0

    def log_expert_load(self, step: int, loads: Any) -> None:
        self.loads.append((step, loads))

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
        "flops": lambda counts: 8e9 * counts.tokens,
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
    records = train(_run(sinks=sinks, on_step=[lambda record, _: seen.append(record)]), _batches())
    assert len(records) == NUM_STEPS
    assert seen == records
    for sink in sinks:
        assert sink.records == records
        assert sink.closed == 1


def test_the_step_hears_its_share_of_the_largest_rate():
    step = Step()
    train(_run(step, max_lr=2.0), _batches())
    assert step.lr_fractions == [0.25, 0.5, 0.25]


def test_utilisation_is_measured_at_the_peak_of_the_device():
    records = train(_run(peak_tflops=500.0), _batches())
    assert [r.mfu for r in records] == [r.tflops_per_device / 500.0 for r in records]


@pytest.mark.parametrize(
    ("every_steps", "due"), [(1, [1, 2, 3]), (2, [2, 3]), (3, [3]), (100, [3])]
)
def test_validation_and_expert_loads_come_every_nth_step_and_after_the_last(every_steps, due):
    step, sink, validated = Step(), Recorder(), []

    def validate() -> Losses:
        validated.append(step.number)
        return Losses(float(step.number), None)

    run = _run(
        step,
        sinks=[sink],
        validate=validate,
        validate_every_steps=every_steps,
        expert_load_every_steps=every_steps,
    )
    records = train(run, _batches())
    assert validated == due
    assert {r.step: r.validation_loss for r in records if r.validation_loss is not None} == {
        number: float(number) for number in due
    }
    assert sink.loads == [(number, {3: [number, 2]}) for number in due]


def test_a_validation_loss_that_is_not_finite_stops_or_is_recorded_as_the_job_says():
    def validate() -> Losses:
        raise NonFiniteError("loss is not finite; rank 0: samples a")

    run = _run(Step(), validate=validate, validate_every_steps=2)
    with pytest.raises(NonFiniteError, match=r"^validation after step 2: loss .* samples a$"):
        train(run, _batches())
    step = Step()
    step.guard.section = SpikesSection(action="skip")
    records = train(_run(step, validate=validate, validate_every_steps=2), _batches())
    assert [record.validation_loss is None for record in records] == [True, False, False]
    assert math.isnan(records[1].validation_loss)


def test_validation_does_not_count_as_the_steps_time(clock):
    def validate() -> Losses:
        loop.time.perf_counter()
        return Losses(1.0, None)

    records = train(_run(validate=validate, validate_every_steps=1), _batches())
    assert [record.seconds for record in records] == [2, 2, 2]


def test_expert_loads_are_gathered_where_no_sink_is():
    """Gathering is collective; only rank 0 has sinks."""
    step, calls = Step(), []
    step.experts = SimpleNamespace(loads=lambda: calls.append(1))
    train(_run(step), _batches())
    assert len(calls) == 1


def test_a_skipped_step_is_recorded_and_counted():
    records = train(_run(Step(skips="loss is nan")), _batches())
    assert [record.skipped for record in records] == ["loss is nan"] * NUM_STEPS
    assert [record.num_skipped for record in records] == [1, 2, 3]


def test_weights_are_settled_once_after_the_last_step():
    step = Step()
    train(_run(step), _batches())
    assert step.settled_after == [NUM_STEPS]


def test_a_callback_sees_the_schedule_already_moved_on():
    """What it saves is the state from which the next step goes on."""
    steps = []
    run = _run()
    run = _run(
        schedule=run.schedule,
        optimizer=run.optimizer,
        on_step=[lambda record, _: steps.append((record.step, run.schedule.num_steps))],
    )
    train(run, _batches())
    assert steps == [(1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("kind", [NonFiniteError, ValueError])
def test_a_step_that_fails_is_named_and_the_sinks_are_closed(kind):
    sink, seen = Recorder(), []
    run = _run(
        Step(fails_at=2, error=kind("samples a")),
        sinks=[sink],
        on_step=[lambda record, _: seen.append(record)],
    )
    with pytest.raises(kind, match=r"^step 2: samples a$") as raised:
        train(run, _batches())
    assert type(raised.value) is kind
    assert [record.step for record in sink.records] == [record.step for record in seen] == [1]
    assert sink.closed == 1
    assert run.schedule.num_steps == 1


def test_an_error_with_another_constructor_is_named_as_a_value_error():
    error = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    with pytest.raises(
        ValueError, match=r"^step 1: 'utf-8' codec can't decode byte 0xff"
    ) as raised:
        train(_run(Step(fails_at=1, error=error)), _batches())
    assert raised.value.__cause__ is error


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
