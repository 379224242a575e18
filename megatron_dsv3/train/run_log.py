"""What a run has logged, finished or still running: its metrics as columns, and their summary.

Imports no torch, so that a run can be looked at wherever its files can be seen.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
KEYS = (
    *("step", "num_steps", "loss", "mtp_loss", "validation_loss", "lr", "grad_norm", "seconds"),
    *("tokens", "tflops_per_device", "mfu", "peak_memory_gib", "expert_balance"),
)
"""Numbers read of a record; all but `step` may be null or absent, in some records or in all."""


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """How the tokens of one step fell on the experts."""

    step: int
    layers: Sequence[int]
    relative: Array
    """[layer, expert], over the mean of the layer; 1 is perfect balance."""


@dataclass(frozen=True, slots=True)
class RunLog:
    """The steps of a run so far, each once."""

    name: str
    columns: Mapping[str, Array]
    """`KEYS` and `tokens_per_second`, [step]; NaN where a record says nothing."""
    skipped: NDArray[np.bool_]
    """[step], whether the update was left out."""
    expert_load: ExpertLoad | None

    def curve(self, key: str) -> tuple[Array, Array]:
        """Steps and finite values, without what belongs to an update that was left out."""
        values = self.columns[key]
        shown = np.isfinite(values)
        if key != "validation_loss":  # it is of the model, not of the update
            shown &= ~self.skipped
        return self.columns["step"][shown], values[shown]


def read_runs(directories: Sequence[Path]) -> list[RunLog]:
    """The runs that log to these directories, named by the ends of their paths that differ.

    Raises:
        ValueError: A directory holds no run or a damaged one, or is given twice.
    """
    paths = [directory.resolve() for directory in directories]
    if twice := [
        str(path) for path, other in zip(directories, paths, strict=True) if paths.count(other) > 1
    ]:
        raise ValueError(f"{' and '.join(twice)}: one run, given {len(twice)} times; give it once")
    return [
        _read_run(directory, name)
        for directory, name in zip(directories, _names(paths), strict=True)
    ]


def _names(paths: Sequence[Path]) -> list[str]:
    """Ends of the paths, as short as tells them apart, without what all end on (often `log`)."""
    parts = [path.parts for path in paths]
    if len(parts) == 1:
        return [str(Path(*parts[0][-2:]))]
    while len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return [str(Path(*part[-depth:])) for part in parts]


def _read_run(directory: Path, name: str) -> RunLog:
    path = directory / "metrics.jsonl"
    records = read_records(path)
    if not records:
        raise ValueError(f"{path}: holds no step yet; wait for the first one")
    rows = [[_number(record.get(key)) for key in KEYS] for record in records]
    columns = dict(zip(KEYS, np.array(rows).T, strict=True))
    seconds = np.where(columns["seconds"] > 0, columns["seconds"], np.nan)
    return RunLog(
        name,
        columns | {"tokens_per_second": columns["tokens"] / seconds},
        np.array([bool(record.get("skipped")) for record in records]),
        _read_expert_load(directory / "expert_load.jsonl"),
    )


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a run's `metrics.jsonl`: each step once, in order.

    Raises:
        ValueError: There is no such file, or it is damaged before its last line.
    """
    directory = path.parent
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory; expected the log.dir of a run")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; is {directory} the log.dir of a run?")
    records: list[dict[str, Any]] = []
    for where, record in _json_lines(path):
        _check(where, record)
        # A resumed run begins at an earlier state: what had been done beyond it no longer counts.
        while records and records[-1]["step"] >= record["step"]:
            records.pop()
        records.append(record)
    return records


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, object) of each line, without a last one that is still being written."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        is_tail = number == len(lines)
        record = _json_object(f"{path}:{number}", line, is_tail=is_tail) if line.strip() else None
        if record is not None:
            yield f"{path}:{number}", record


def _json_object(where: str, line: bytes, *, is_tail: bool) -> dict[str, Any] | None:
    """None of a tail, a last line without its end, that does not parse."""
    try:
        record = json.loads(line)
    except ValueError as error:
        if is_tail:
            return None
        raise ValueError(f"{where}: not JSON ({error}); remove the line") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {record!r}")
    return record


def _check(where: str, record: Mapping[str, Any]) -> None:
    if type(record.get("step")) is not int:
        raise ValueError(f"{where}: step: expected a whole number, got {record.get('step')!r}")
    for key in KEYS:
        if not isinstance(record.get(key), int | float | None):
            raise ValueError(f"{where}: {key}: expected a number or null, got {record[key]!r}")


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _read_expert_load(path: Path) -> ExpertLoad | None:
    """The last one, as a heat map shows a moment; None where none was written."""
    if not path.is_file():
        return None
    with path.open("rb") as lines:  # a large model writes 100 kB a step: none but two are kept
        last_two = deque(lines, maxlen=2)
    for line in reversed(last_two):
        where = f"{path}: last line"
        record = _json_object(where, line, is_tail=not line.endswith(b"\n"))
        if record is not None:
            return _expert_load(where, record)
    return None


def _expert_load(where: str, record: Mapping[str, Any]) -> ExpertLoad:
    try:
        step, load = int(record["step"]), np.array(record["load"], dtype=np.float64)
        layers = list(map(int, record.get("layers", range(len(load)))))
        if load.ndim != 2 or not load.size or len(layers) != len(load):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{where}: expected step, layers, and in load as many numbers for each of the layers"
        ) from None
    mean = load.mean(axis=1, keepdims=True)
    return ExpertLoad(step, layers, load / np.where(mean > 0, mean, 1.0))


def summary(run: RunLog) -> dict[str, str]:
    """The run in figures: label -> text, `-` where it has no such thing; every run has all."""
    planned, step = run.columns["num_steps"][-1], run.columns["step"][-1]
    loss = run.curve("loss")[1]
    return {
        "Steps": f"{step:,.0f}" if np.isnan(planned) else f"{step:,.0f} of {planned:,.0f}",
        "First loss": _text(loss[:1], "{:.4f}"),
        "Last loss": _text(loss[-1:], "{:.4f}"),
        "Best loss (step)": _best(run, "loss"),
        "Best validation (step)": _best(run, "validation_loss"),
        "Tokens seen": _text(_known(run, "tokens"), "{:,.0f}", np.sum),
        "Tokens/s, last half": _recent(run, "tokens_per_second", "{:,.0f}"),
        "TFLOP/s/device, last half": _recent(run, "tflops_per_device", "{:.3g}"),
        "MFU, last half": _recent(run, "mfu", "{:.1%}"),
        "Peak memory, rank 0": _text(_known(run, "peak_memory_gib"), "{:.1f} GiB", np.max),
        "Skipped steps": f"{run.skipped.sum():,}",
    }


def _known(run: RunLog, key: str) -> Array:
    values = run.columns[key]
    return values[np.isfinite(values)]


def _text(values: Array, form: str, reduce: Callable[[Array], np.float64] = np.mean) -> str:
    return form.format(reduce(values)) if values.size else "-"


def _best(run: RunLog, key: str) -> str:
    steps, values = run.curve(key)
    if not values.size:
        return "-"
    best = values.argmin()
    return f"{values[best]:.4f} ({steps[best]:,.0f})"


def _recent(run: RunLog, key: str, form: str) -> str:
    """Mean over the time of the last half of the steps, when the start-up is over.

    Over the time, not the steps: a step that took long weighs as long as it took.
    """
    half = len(run.columns["step"]) // 2
    values, seconds = run.columns[key][half:], run.columns["seconds"][half:]
    known = np.isfinite(values) & (seconds > 0)
    if not known.any():
        return "-"
    return form.format(np.average(values[known], weights=seconds[known]))
