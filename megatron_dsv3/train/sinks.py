"""Weights & Biases and MLflow: used when a job asks for them, needed by nobody else.

Neither is a dependency, so both are imported by name, and a job that asks for what is not installed
is refused before it starts. Later their troubles cost a run nothing: its own files have everything.
"""

import importlib
import importlib.util
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import ModuleType
from typing import Any, Protocol

from megatron_dsv3.train.metrics import Sink, StepRecord, scalars

logger = logging.getLogger(__name__)
CLOSE_SECONDS = 60
"""How long the end of a run waits for a tracker."""


def tracker_problems(*, wandb_project: str | None, mlflow_experiment: str | None) -> list[str]:
    """Why these cannot be tracked: one line for each package that is asked for and missing."""
    wanted = {"wandb": wandb_project, "mlflow": mlflow_experiment}
    return [
        f"{_KINDS[name].setting} {value}: {name} is not installed; pip install {name}, "
        f"or set {_KINDS[name].setting} to null"
        for name, value in wanted.items()
        if value is not None and not _is_installed(name)
    ]


def _is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    # W&B writes to a directory `wandb`, which Python takes for a package without code.
    return spec is not None and spec.origin is not None


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker shows of a run beside its figures."""

    name: str
    config: Mapping[str, Any]
    """The job, nested, as JSON could hold it."""
    directory: Path
    """For files of the tracker's own."""


def start_trackers(
    run: TrackedRun, *, wandb_project: str | None, mlflow_experiment: str | None
) -> list["TrackerSink"]:
    """Starts a run in each tracker that is asked for; on rank 0.

    Raises:
        ValueError: One of them does not start: no login, no such server.
    """
    wanted = {"wandb": wandb_project, "mlflow": mlflow_experiment}
    sinks: list[TrackerSink] = []
    try:
        for name, value in wanted.items():
            if value is not None:
                sinks.append(_start(name, value, run))
    except ValueError:
        for sink in sinks:
            sink.close()
        raise
    return sinks


def _start(name: str, value: str, run: TrackedRun) -> "TrackerSink":
    kind = _KINDS[name]
    try:
        return TrackerSink(name, kind.start(importlib.import_module(name), value, run))
    except Exception as error:  # their kinds of error are many: network, login, disk, database
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{kind.setting} {value}: {name} did not start: {reason}; {kind.way_out}, or set "
            f"{kind.setting} to null"
        ) from error


class Tracker(Protocol):
    """One run in one tracker."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Takes a step's figures."""

    def finish(self, *, complete: bool) -> None:
        """Sends what is left; `complete` if all planned steps were done."""


class TrackerSink(Sink):
    """Hands records to a tracker in a thread: all ranks would wait for the answer of a server."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker, self.complete = name, tracker, False
        self.actions: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # A daemon, as a server that never answers must not keep the process alive.
        self.thread = Thread(target=self._work, name=name, daemon=True)
        self.thread.start()

    def log(self, record: StepRecord) -> None:
        """Sends all figures that the record has."""
        self.complete = record.step == record.num_steps
        self.actions.put(partial(self.tracker.log, scalars(record), record.step))

    def close(self) -> None:
        """Ends the tracker's run, as failed where steps are missing."""
        self.actions.put(partial(self.tracker.finish, complete=self.complete))
        self.actions.put(None)
        self.thread.join(CLOSE_SECONDS)
        if self.thread.is_alive():
            logger.warning("%s: not all was sent in %d s; given up", self.name, CLOSE_SECONDS)

    def _work(self) -> None:
        failing = False
        while action := self.actions.get():
            try:
                action()
            except Exception as error:  # whatever it is, days of training are worth more
                if not failing:
                    logger.warning("%s: %s; the run goes on without it", self.name, error)
                failing = True
            else:
                failing = False


class _Wandb:
    def __init__(self, wandb: ModuleType, project: str, run: TrackedRun) -> None:
        self.run = wandb.init(
            project=project,
            name=run.name,
            config=dict(run.config),
            dir=str(run.directory),
            settings={"console": "off"},  # else it takes over standard output, the bar's too
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self.run.log(dict(figures), step=step)

    def finish(self, *, complete: bool) -> None:
        self.run.finish(exit_code=0 if complete else 1)


class _Mlflow:
    """Through a client of its own: the fluent interface keeps an active run for the process."""

    def __init__(self, mlflow: ModuleType, experiment: str, run: TrackedRun) -> None:
        self.entities = importlib.import_module("mlflow.entities")
        self.client = mlflow.MlflowClient()
        known = self.client.get_experiment_by_name(experiment)
        experiment_id = known.experiment_id if known else self.client.create_experiment(experiment)
        self.run_id = self.client.create_run(experiment_id, run_name=run.name).info.run_id
        params = [self.entities.Param(key, value) for key, value in _dotted(run.config)]
        for start in range(0, len(params), _MLFLOW_PARAMS_AT_ONCE):
            batch = params[start : start + _MLFLOW_PARAMS_AT_ONCE]
            self.client.log_batch(self.run_id, params=batch)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self.entities.Metric(name, value, now, step) for name, value in figures.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def finish(self, *, complete: bool) -> None:
        self.client.set_terminated(self.run_id, status="FINISHED" if complete else "FAILED")


_MLFLOW_PARAMS_AT_ONCE = 100
"""More in one request are refused."""


def _dotted(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(`section.setting`, value as on the command line)."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True, slots=True)
class _Kind:
    setting: str
    start: Callable[[ModuleType, str, TrackedRun], Tracker]
    way_out: str


_KINDS = {
    "wandb": _Kind("log.wandb_project", _Wandb, "run `wandb login` or set WANDB_MODE=offline"),
    "mlflow": _Kind("log.mlflow_experiment", _Mlflow, "check MLFLOW_TRACKING_URI"),
}
