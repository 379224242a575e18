"""Weights & Biases and MLflow, as stand-ins that note what they are told."""

import logging
import math
import sys
import threading
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from test_run_log import record

from megatron_dsv3.train import sinks
from megatron_dsv3.train.metrics import StepRecord, scalars
from megatron_dsv3.train.sinks import TrackedRun, start_trackers, tracker_problems

CONFIG = {"optimizer": {"lr": 2e-7}, "data": {"paths": ["a", "b"]}, "log": {"dir": None}}
FIGURES = {
    "train/epoch": 0.125,
    "train/loss": 3.75,
    "train/mtp_loss": 4.75,
    "train/lr": 1e-6,
    "train/grad_norm": 0.5,
    "train/seconds": 2.0,
    "train/tokens": 1000.0,
    "train/counted_tokens": 600.0,
    "train/num_devices": 2.0,
    "train/tflops_per_device": 300.0,
    "train/mfu": 0.3,
    "train/peak_memory_gib": 40.0,
    "train/expert_balance": 1.5,
    "train/num_skipped": 0.0,
    "train/tokens_per_second": 500.0,
}


class Calls(list[tuple[Any, ...]]):
    """What a stand-in was told; `broken` names the calls that it fails at."""

    broken: tuple[str, ...] = ()

    def note(self, name: str, *arguments: Any) -> None:
        self.append((name, *arguments))
        if name in self.broken:
            raise ConnectionError(f"{name}: no answer\nfrom the server")


def install(monkeypatch, name: str, **content: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, origin="a stand-in")
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def wandb(monkeypatch) -> Calls:
    calls = Calls()

    def init(**arguments: Any) -> SimpleNamespace:
        calls.note("init", arguments)
        return SimpleNamespace(
            log=lambda figures, step: calls.note("log", figures, step),
            finish=lambda exit_code: calls.note("finish", exit_code),
        )

    install(monkeypatch, "wandb", init=init)
    return calls


@pytest.fixture
def mlflow(monkeypatch) -> Calls:
    calls = Calls()

    class MlflowClient:
        def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
            calls.note("get_experiment_by_name", name)
            return SimpleNamespace(experiment_id="7") if name == "known" else None

        def create_experiment(self, name: str) -> str:
            calls.note("create_experiment", name)
            return "8"

        def create_run(self, experiment_id: str, run_name: str) -> SimpleNamespace:
            calls.note("create_run", experiment_id, run_name)
            return SimpleNamespace(info=SimpleNamespace(run_id="r"))

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            calls.note("log_batch", run_id, list(metrics), list(params))

        def set_terminated(self, run_id: str, status: str) -> None:
            calls.note("set_terminated", run_id, status)

    install(monkeypatch, "mlflow", MlflowClient=MlflowClient)
    install(
        monkeypatch,
        "mlflow.entities",
        Metric=lambda key, value, timestamp, step: (key, value, timestamp, step),
        Param=lambda key, value: (key, value),
    )
    return calls


@pytest.fixture
def run(tmp_path) -> TrackedRun:
    return TrackedRun("my-r1", CONFIG, tmp_path)


def step(number: int, **changes: Any) -> StepRecord:
    return StepRecord(**record(number, num_steps=2, epoch=number / 8, **changes))


def test_figures_have_the_names_of_tensorboard_and_none_is_invented():
    assert scalars(step(1)) == FIGURES
    odd = step(1, mtp_loss=None, mfu=None, validation_loss=3.5, skipped="no good", num_skipped=2)
    assert scalars(odd) == {
        **{k: v for k, v in FIGURES.items() if k not in ("train/mtp_loss", "train/mfu")},
        "train/validation_loss": 3.5,
        "train/num_skipped": 2.0,
    }
    lost = step(1, loss=math.nan, grad_norm=math.inf)
    assert FIGURES.keys() - scalars(lost).keys() == {"train/loss", "train/grad_norm"}


# Weights & Biases


def test_wandb_gets_the_job_and_every_step(wandb, run, tmp_path):
    [sink] = start_trackers(run, wandb_project="p", mlflow_experiment=None)
    sink.log(step(1))
    sink.log(step(2))
    sink.close()
    assert wandb == [
        (
            "init",
            {
                "project": "p",
                "name": "my-r1",
                "config": CONFIG,
                "dir": str(tmp_path),
                "settings": {"console": "off"},
            },
        ),
        ("log", FIGURES, 1),
        ("log", scalars(step(2)), 2),
        ("finish", 0),
    ]


def test_a_run_that_ends_early_is_a_failed_one(wandb, mlflow, run):
    for sink in start_trackers(run, wandb_project="p", mlflow_experiment="known"):
        sink.log(step(1))
        sink.close()
    assert wandb[-1] == ("finish", 1)
    assert mlflow[-1] == ("set_terminated", "r", "FAILED")


# MLflow


def test_mlflow_gets_the_settings_by_name_and_every_step(mlflow, run):
    [sink] = start_trackers(run, wandb_project=None, mlflow_experiment="known")
    sink.log(step(1))
    sink.log(step(2))
    sink.close()
    params = [("optimizer.lr", "2e-07"), ("data.paths", '["a", "b"]'), ("log.dir", "null")]
    assert mlflow[:3] == [
        ("get_experiment_by_name", "known"),
        ("create_run", "7", "my-r1"),
        ("log_batch", "r", [], params),
    ]
    (_, _, first, _), (_, _, second, _), last = mlflow[3:]
    assert {key: (value, at) for key, value, _, at in first} == {
        key: (value, 1) for key, value in FIGURES.items()
    }
    assert {at for *_, at in second} == {2}
    assert last == ("set_terminated", "r", "FINISHED")


def test_an_experiment_that_mlflow_does_not_know_is_made(mlflow, run):
    [sink] = start_trackers(run, wandb_project=None, mlflow_experiment="new")
    sink.close()
    assert mlflow[1:3] == [("create_experiment", "new"), ("create_run", "8", "my-r1")]


def test_mlflow_takes_no_more_than_100_settings_at_once(mlflow, tmp_path):
    run = TrackedRun("r", {str(i): i for i in range(250)}, tmp_path)
    [sink] = start_trackers(run, wandb_project=None, mlflow_experiment="known")
    sink.close()
    batches = [call[3] for call in mlflow if call[0] == "log_batch"]
    assert [len(batch) for batch in batches] == [100, 100, 50]
    assert [key for batch in batches for key, _ in batch] == [str(i) for i in range(250)]


# What goes wrong


def test_nothing_is_started_that_is_not_asked_for(wandb, mlflow, run):
    assert start_trackers(run, wandb_project=None, mlflow_experiment=None) == []
    assert wandb == []
    assert mlflow == []


def test_what_is_asked_for_and_not_installed_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    for name in ("wandb", "mlflow"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert tracker_problems(wandb_project=None, mlflow_experiment=None) == []
    assert tracker_problems(wandb_project="p", mlflow_experiment="e") == [
        "log.wandb_project p: wandb is not installed; pip install wandb, or set "
        "log.wandb_project to null",
        "log.mlflow_experiment e: mlflow is not installed; pip install mlflow, or set "
        "log.mlflow_experiment to null",
    ]


def test_what_is_installed_is_no_problem(wandb, mlflow):
    assert tracker_problems(wandb_project="p", mlflow_experiment="e") == []


def test_the_directory_that_wandb_writes_to_is_not_taken_for_the_package(monkeypatch, tmp_path):
    (tmp_path / "wandb" / "latest-run").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    [problem] = tracker_problems(wandb_project="p", mlflow_experiment=None)
    assert "pip install wandb" in problem


def test_a_tracker_that_does_not_start_stops_the_job_in_one_line(wandb, mlflow, run):
    mlflow.broken = ("create_run",)
    with pytest.raises(
        ValueError,
        match=r"log\.mlflow_experiment known: mlflow did not start: create_run: no answer; "
        r"check MLFLOW_TRACKING_URI, or set log\.mlflow_experiment to null$",
    ) as caught:
        start_trackers(run, wandb_project="p", mlflow_experiment="known")
    assert len(str(caught.value).splitlines()) == 1
    assert wandb[-1] == ("finish", 1), "what had been started is ended"
    wandb.broken = ("init",)
    with pytest.raises(ValueError, match=r"log\.wandb_project p: .*; run `wandb login` or set"):
        start_trackers(run, wandb_project="p", mlflow_experiment=None)


def test_a_tracker_that_breaks_is_said_once_and_costs_the_run_nothing(wandb, run, caplog):
    [sink] = start_trackers(run, wandb_project="p", mlflow_experiment=None)
    wandb.broken = ("log", "finish")
    with caplog.at_level(logging.WARNING):
        sink.log(step(1))
        sink.log(step(2))
        sink.close()
    assert [call[0] for call in wandb] == ["init", "log", "log", "finish"], "it may recover"
    assert len(caplog.messages) == 1
    assert "wandb: log: no answer" in caplog.messages[0]


def test_a_server_that_does_not_answer_holds_up_neither_a_step_nor_the_end(
    mlflow, run, monkeypatch, caplog
):
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.05)
    [sink] = start_trackers(run, wandb_project=None, mlflow_experiment="known")
    answer = threading.Event()
    monkeypatch.setattr(sink.tracker.client, "log_batch", lambda *_, **__: answer.wait(60))
    sink.log(step(1))
    sink.log(step(2))
    sink.close()
    assert "mlflow: not all was sent" in caplog.text
    assert mlflow[-1][0] == "log_batch", "not ended yet"
    answer.set()
    sink.thread.join(10)
    assert mlflow[-1] == ("set_terminated", "r", "FINISHED")
