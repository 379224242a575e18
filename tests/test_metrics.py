"""The step line to the letter; metrics written and read back, also by TensorBoard's own reader."""

import io
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_dsv3.train.metrics import (
    FileSink,
    LineSink,
    StepRecord,
    read_metrics,
    step_line,
)
from megatron_dsv3.train.progress import ProgressSink

RECORD = StepRecord(
    step=7,
    num_steps=60,
    epoch=0.1167,
    loss=11.77021,
    mtp_loss=11.80551,
    lr=4.9e-06,
    grad_norm=3.14159,
    seconds=2.0,
    tokens=82_469,
    counted_tokens=1_001,
    num_devices=8,
    tflops_per_device=389.96,
    mfu=0.3943,
    peak_memory_gib=71.25,
    expert_balance=1.375,
)
OPTIONAL = ("mtp_loss", "peak_memory_gib")


def test_a_line_by_hand():
    assert step_line(RECORD) == (
        "step 7/60 epoch 0.12 loss 11.7702 mtp_loss 11.8055 valid_loss - lr 4.90e-06 "
        "grad_norm 3.142 tok/s 41,234 tok/s/device 5,154 counted_tok/s 500 "
        "counted_tok/s/device 63 TFLOP/s/device 390 MFU 39.4% mem_GiB 71.2 "
        "expert_balance 1.38 skipped 0"
    )


def test_a_line_keeps_its_keys_where_there_is_no_value():
    bare = replace(RECORD, mtp_loss=None, peak_memory_gib=None, tflops_per_device=0.01234)
    line = step_line(bare)
    assert line.split()[::2] == step_line(RECORD).split()[::2]
    assert " mtp_loss - " in line
    assert " mem_GiB - " in line
    assert " TFLOP/s/device 0.0123 " in line


def test_tokens_per_second_are_real_tokens_of_the_whole_job():
    assert RECORD.tokens_per_second == 82_469 / 2


@pytest.mark.parametrize(
    ("every_steps", "expected"),
    [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 3, 6, 7]), (50, [1, 7])],
)
def test_lines_are_the_first_the_last_and_every_nth(every_steps, expected):
    lines = []
    sink = LineSink(lines.append, every_steps=every_steps)
    records = [replace(RECORD, step=step, num_steps=7) for step in range(1, 8)]
    for record in records:
        sink.log(record)
    sink.close()
    assert lines == [step_line(records[step - 1]) for step in expected]


def test_a_skipped_step_is_said_whatever_line_is_due():
    lines = []
    sink = LineSink(lines.append, every_steps=5)
    skipped = replace(RECORD, step=3, skipped="loss is nan; samples a", num_skipped=2)
    for record in (replace(RECORD, step=2), skipped):
        sink.log(record)
    assert lines == ["step 3 skipped: loss is nan; samples a"]
    assert step_line(skipped).endswith("skipped 2")


def test_records_are_read_back_as_they_were(tmp_path):
    records = [
        RECORD,
        replace(RECORD, step=8, loss=0.1 + 0.2, lr=1 / 3),
        replace(RECORD, step=9, mtp_loss=None, peak_memory_gib=None),
    ]
    sink = FileSink(tmp_path / "new" / "log")
    for number, record in enumerate(records, start=1):
        sink.log(record)
        # A run that dies keeps what it logged.
        assert len((tmp_path / "new/log/metrics.jsonl").read_text().splitlines()) == number
    sink.close()
    assert read_metrics(tmp_path / "new" / "log") == records


def test_a_figure_that_is_not_finite_is_null_in_json_and_nan_when_read_back(tmp_path):
    sink = FileSink(tmp_path)
    sink.log(replace(RECORD, loss=math.nan, grad_norm=math.inf, skipped="loss is nan"))
    sink.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    values = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert values["loss"] is values["grad_norm"] is None
    [record] = read_metrics(tmp_path)
    assert math.isnan(record.loss)
    assert math.isnan(record.grad_norm)
    assert replace(record, loss=1.0, grad_norm=1.0, skipped=None) == replace(
        RECORD, loss=1.0, grad_norm=1.0
    )


@pytest.mark.parametrize("file", ["metrics.jsonl", "expert_load.jsonl"])
def test_half_a_line_that_a_crash_left_is_passed_over_and_the_next_run_cuts_it_off(tmp_path, file):
    sink = FileSink(tmp_path)
    sink.log(RECORD)
    sink.log_expert_load(7, {1: [1, 2]})
    sink.close()
    whole = (tmp_path / file).read_bytes()
    with (tmp_path / file).open("ab") as lines:
        lines.write(whole[: len(whole) // 2])
    assert read_metrics(tmp_path) == [RECORD]
    sink = FileSink(tmp_path)
    assert (tmp_path / file).read_bytes() == whole
    sink.log(replace(RECORD, step=8))
    sink.close()
    assert read_metrics(tmp_path) == [RECORD, replace(RECORD, step=8)]


def test_a_second_run_into_one_directory_adds_to_it(tmp_path):
    for step in (1, 2):
        sink = FileSink(tmp_path)
        sink.log(replace(RECORD, step=step))
        sink.close()
    assert [record.step for record in read_metrics(tmp_path)] == [1, 2]


def test_each_line_is_a_json_object_that_others_can_read(tmp_path):
    sink = FileSink(tmp_path)
    sink.log(RECORD)
    sink.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == asdict(RECORD)


def test_tensorboard_reads_every_figure(tmp_path):
    sink = FileSink(tmp_path)
    records = [replace(RECORD, step=step, loss=12.0 - step) for step in (1, 2, 5)]
    for record in records:
        sink.log(record)
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    absent = {"step", "num_steps", "validation_loss", "skipped"}
    names = asdict(RECORD).keys() - absent | {"tokens_per_second"}
    assert set(events.Tags()["scalars"]) == {f"train/{name}" for name in names}
    for name in names:
        scalars = events.Scalars(f"train/{name}")
        assert [scalar.step for scalar in scalars] == [1, 2, 5]
        expected = [getattr(record, name) for record in records]
        assert [scalar.value for scalar in scalars] == pytest.approx(expected, rel=1e-6), name


def test_tensorboard_gets_no_figure_that_is_not_there(tmp_path):
    sink = FileSink(tmp_path)
    sink.log(replace(RECORD, **dict.fromkeys(OPTIONAL)))
    sink.close()
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    assert "train/loss" in tags
    assert not {f"train/{name}" for name in OPTIONAL} & set(tags)


def test_expert_loads_are_lines_of_json_and_a_heat_map(tmp_path):
    """A row a layer, each as bright as its busiest expert; a layer without tokens stays dark."""
    sink = FileSink(tmp_path)
    loads = {3: [4, 0, 8, 2], 4: [0, 0, 0, 0], 61: [1, 1, 1, 1]}
    sink.log_expert_load(50, loads)
    first = (tmp_path / "expert_load.jsonl").read_text()
    sink.log_expert_load(100, loads)
    sink.close()
    assert json.loads(first) == {"step": 50, "layers": [3, 4, 61], "load": list(loads.values())}
    assert len((tmp_path / "expert_load.jsonl").read_text().splitlines()) == 2
    events = EventAccumulator(str(tmp_path), {"images": 0}).Reload().Images("train/expert_load")
    assert [event.step for event in events] == [50, 100]
    pixels = imread(io.BytesIO(events[0].encoded_image_string), format="png")
    shades = np.round(pixels.reshape(3, 4, -1)[..., 0] * 255).tolist()
    assert shades == [[127, 0, 255, 63], [0] * 4, [255] * 4]


def test_a_directory_without_metrics_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent: no such directory; expected the log"):
        read_metrics(tmp_path / "absent")


def _progress(*, is_terminal: bool) -> str:
    written = io.StringIO()
    console = Console(file=written, force_terminal=is_terminal, width=100)
    sink = ProgressSink(console, 60)
    sink.log(RECORD)
    if is_terminal:
        sink.progress.refresh()
    sink.close()
    return written.getvalue()


def test_a_progress_bar_shows_steps_and_loss_on_a_terminal():
    shown = _progress(is_terminal=True)
    assert "7/60" in shown
    assert "loss 11.7702" in shown


def test_a_progress_bar_writes_nothing_to_a_file():
    assert _progress(is_terminal=False) == ""
