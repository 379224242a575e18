"""Runs read back from their files: finished, running, resumed, damaged; and their summary."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dsv3.train.metrics import FileSink, StepRecord
from megatron_dsv3.train.run_log import KEYS, RunLog, read_runs, summary


def record(step: int, **changes: Any) -> dict[str, Any]:
    values = StepRecord(
        step=step,
        num_steps=8,
        epoch=step / 8,
        loss=4.0 - step / 4,
        mtp_loss=5.0 - step / 4,
        lr=1e-6,
        grad_norm=0.5,
        seconds=2.0,
        tokens=1000,
        counted_tokens=600,
        num_devices=2,
        tflops_per_device=300.0,
        mfu=0.3,
        peak_memory_gib=40.0,
        expert_balance=1.5,
    )
    return {**dataclasses.asdict(values), **changes}


def write_run(directory: Path, *lines: dict[str, Any] | str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
    (directory / "metrics.jsonl").write_text("".join(texts))
    return directory


def write_load(directory: Path, text: str) -> None:
    (directory / "expert_load.jsonl").write_text(text)


def read(directory: Path) -> RunLog:
    [run] = read_runs([directory])
    return run


# What is read


def test_what_training_writes_is_read(tmp_path):
    sink = FileSink(tmp_path)
    for step in (1, 2):
        sink.log(StepRecord(**record(step)))
        sink.log_expert_load(step, {3: [step, 3], 4: [2, 2]})
    sink.close()
    run = read(tmp_path)
    assert set(KEYS) <= {field.name for field in dataclasses.fields(StepRecord)}
    for key in KEYS:
        expected = [np.nan if record(i)[key] is None else record(i)[key] for i in (1, 2)]
        assert np.array_equal(run.columns[key], expected, equal_nan=True), key
    assert run.columns["tokens_per_second"].tolist() == [500, 500]
    assert run.expert_load.step == 2
    assert run.expert_load.layers == [3, 4]
    assert run.expert_load.relative.tolist() == [[0.8, 1.2], [1, 1]]


def test_a_record_may_lack_everything_but_its_step(tmp_path):
    run = read(write_run(tmp_path, {"step": 1}, {"step": 2, "a_key_of_tomorrow": "x"}))
    assert run.columns["step"].tolist() == [1, 2]
    assert np.isnan(run.columns["loss"]).all()
    assert run.expert_load is None
    assert set(summary(run).values()) == {"2", "0", "-"}


def test_a_last_line_that_is_being_written_is_left_out(tmp_path):
    whole = json.dumps(record(3))
    run = read(write_run(tmp_path, record(1), record(2), whole[: len(whole) // 2]))
    assert run.columns["step"].tolist() == [1, 2]
    assert read(write_run(tmp_path, record(1), whole)).columns["step"].tolist() == [1, 3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 2, "lo\n', r"metrics\.jsonl:2: not JSON \(.*\); remove the line"),
        ('{"step": 2, "lo{"step": 2}\n', r"metrics\.jsonl:2: not JSON"),
        ("\0\0\0\n", r"metrics\.jsonl:2: not JSON"),
        ("[1, 2]\n", r"metrics\.jsonl:2: expected a JSON object, got \[1, 2\]"),
        ("{}\n", r"metrics\.jsonl:2: step: expected a whole number, got None"),
        ('{"step": 2.5}\n', r"metrics\.jsonl:2: step: expected a whole number, got 2\.5"),
        ('{"step": 2, "lr": "low"}\n', r"metrics\.jsonl:2: lr: expected a number .* got 'low'"),
    ],
)
def test_a_damaged_line_in_the_middle_is_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        read(write_run(tmp_path, record(1), line, record(3)))


def test_a_step_trained_again_after_a_resume_counts_as_the_later_one(tmp_path):
    run = read(write_run(tmp_path, *map(record, (1, 2, 3)), record(2, loss=9.0), record(3)))
    assert run.columns["step"].tolist() == [1, 2, 3]
    assert run.columns["loss"].tolist() == [3.75, 9.0, 3.25]


def test_steps_beyond_the_state_of_a_resume_are_void(tmp_path):
    run = read(write_run(tmp_path, *map(record, (1, 2, 3, 4)), record(2, loss=9.0)))
    assert run.columns["loss"].tolist() == [3.75, 9.0]


def test_a_skipped_update_is_on_no_curve_but_validation(tmp_path):
    odd = record(2, skipped="loss beyond 5 times the median", loss=80.0, validation_loss=3.0)
    run = read(write_run(tmp_path, record(1), odd, record(3, loss=float("nan"))))
    assert run.skipped.tolist() == [False, True, False]
    assert [values.tolist() for values in run.curve("loss")] == [[1], [3.75]]
    assert [values.tolist() for values in run.curve("grad_norm")] == [[1, 3], [0.5, 0.5]]
    assert [values.tolist() for values in run.curve("validation_loss")] == [[2], [3.0]]


# Expert load


def test_the_last_whole_expert_load_is_taken(tmp_path):
    write_run(tmp_path, record(1))
    first, second = ({"step": i, "load": [[i, 3 * i], [0, 0]]} for i in (1, 2))
    write_load(tmp_path, f'{json.dumps(first)}\n{json.dumps(second)}\n{{"step": 3, "lo')
    load = read(tmp_path).expert_load
    assert load.step == 2
    assert load.relative.tolist() == [[0.5, 1.5], [0, 0]], "a layer without a token stays zero"
    write_load(tmp_path, '{"step": 1, "lo')
    assert read(tmp_path).expert_load is None
    write_load(tmp_path, "")
    assert read(tmp_path).expert_load is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 1}', "last line: expected step, layers, and in load"),
        ('{"step": 1, "load": [[1, 2], [1]]}', "as many numbers for each of the layers"),
        ('{"step": 1, "load": [1, 2]}', "as many numbers for each of the layers"),
        ('{"step": 1, "load": []}', "as many numbers for each of the layers"),
        ('{"step": 1, "layers": [1], "load": [[1], [2]]}', "expected step, layers, and in load"),
        ("nonsense", r"expert_load\.jsonl: last line: not JSON"),
    ],
)
def test_a_damaged_expert_load_is_named(tmp_path, line, message):
    write_run(tmp_path, record(1))
    write_load(tmp_path, line + "\n")
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


# Which runs


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such directory; expected the log\.dir"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"metrics\.jsonl: no such file; is .* the log\.dir"):
        read_runs([tmp_path])
    for content in ("", '{"step": 1, "lo'):
        with pytest.raises(ValueError, match=r"metrics\.jsonl: holds no step yet; wait"):
            read(write_run(tmp_path, content))


def test_a_run_given_twice_is_refused(tmp_path):
    path = write_run(tmp_path / "a", record(1))
    with pytest.raises(ValueError, match=r"a and .*/b/\.\./a: one run, given 2 times"):
        read_runs([path, tmp_path / "b" / ".." / "a"])


@pytest.mark.parametrize(
    ("directories", "names"),
    [
        (["x/a"], ["x/a"]),
        (["x/a", "y/b"], ["a", "b"]),
        (["x/a/log", "x/b/log"], ["a", "b"]),
        (["x/a", "y/a", "y/b"], ["x/a", "y/a", "y/b"]),
        (["x/log", "x/y/log"], ["x", "y"]),
    ],
)
def test_runs_are_named_by_what_tells_their_paths_apart(tmp_path, directories, names):
    runs = read_runs([write_run(tmp_path / name, record(1)) for name in directories])
    assert [run.name for run in runs] == names


# Summary


def test_the_summary_says_what_the_run_was(tmp_path):
    lines = [record(step, peak_memory_gib=38.0 + step) for step in range(1, 5)]
    lines[1] |= {"loss": 1.0, "skipped": "no good"}
    lines[2] |= {"loss": 2.5, "validation_loss": 2.75, "seconds": 6.0, "tokens": 9000}
    lines[3] |= {"mfu": 0.1, "tflops_per_device": 100.0}
    assert summary(read(write_run(tmp_path, *lines))) == {
        "Steps": "4 of 8",
        "First loss": "3.7500",
        "Last loss": "3.0000",
        "Best loss (step)": "2.5000 (3)",
        "Best validation (step)": "2.7500 (3)",
        "Tokens seen": "12,000",
        "Tokens/s, last half": "1,250",  # (9000 + 1000) / (6 s + 2 s)
        "TFLOP/s/device, last half": "250",  # 300 for 6 s, 100 for 2 s
        "MFU, last half": "25.0%",
        "Peak memory, rank 0": "42.0 GiB",
        "Skipped steps": "1",
    }
