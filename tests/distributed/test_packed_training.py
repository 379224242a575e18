"""The whole command on packed rows in several layouts, against one process with a sample a row."""

from pathlib import Path

import pytest
import torch
from distributed.launch import torchrun
from safetensors.torch import load_file
from small_job import write_chats, write_job, write_model

from megatron_dsv3 import cli
from megatron_dsv3.data.dataset import RowOptions, Rows
from megatron_dsv3.data.pipeline import SampleOptions
from megatron_dsv3.data.prepare import PrepareOptions, prepare
from megatron_dsv3.data.store import Store
from megatron_dsv3.data.tokens import load_tokenizer
from megatron_dsv3.train.metrics import StepRecord, read_metrics

ROW_LENGTH, MULTIPLE, NUM_STEPS = 64, 4, 2
MODEL = {"num_hidden_layers": 3, "hidden_size": 16, "kv_lora_rank": 8, "q_lora_rank": 8}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Model, chat files and a store of them."""
    place = tmp_path_factory.mktemp("inputs")
    model = write_model(place / "model", **MODEL)
    chats = write_chats(place / "chats.jsonl")
    options = PrepareOptions(
        template="deepseek_r1", samples=SampleOptions(seq_length=ROW_LENGTH), num_workers=1
    )
    prepare([chats], place / "store", tokenizer=load_tokenizer(model), options=options)
    return place


def _train(
    inputs: Path, out: Path, *, num_processes: int, batch_size: int, **sections
) -> list[StepRecord]:
    """Each step takes all the data, so what is in a row makes no difference to it."""
    out.mkdir()
    job = write_job(
        out,
        inputs / "model",
        inputs / "chats.jsonl",
        data={"seq_length": ROW_LENGTH, **sections.pop("data")},
        train={"global_batch_size": batch_size, "num_epochs": NUM_STEPS, "device": "cpu"},
        optimizer={"lr": 1e-3, "eps": 1e-5},
        checkpoint={"every_steps": None},
        **sections,
    )
    torchrun(num_processes, Path(cli.__file__), Path("train"), job, timeout_s=600)
    return read_metrics(out / "log")


@pytest.mark.slow
def test_packed_rows_train_as_single_samples_do(inputs, tmp_path):
    store = Store(inputs / "store")
    num_rows = len(Rows(store, RowOptions(length=ROW_LENGTH, multiple=MULTIPLE)))
    assert 1 < num_rows < len(store)
    one = _train(
        inputs,
        tmp_path / "one",
        num_processes=1,
        batch_size=len(store),
        data={"packed": False},
    )
    packed = {"document_multiple": MULTIPLE}
    from_store = {**packed, "paths": [], "store": str(inputs / "store"), "template": None}
    layouts = {
        "CP2, chat files": ({"cp_size": 2}, packed),
        "PP2, a store": ({"pp_size": 2}, from_store),
    }
    before = load_file(inputs / "model" / "model.safetensors")
    expected = load_file(tmp_path / "one" / "out" / "model.safetensors")
    for name, (parallel, data) in layouts.items():
        records = _train(
            inputs,
            tmp_path / name,
            num_processes=2,
            batch_size=num_rows,
            parallel=parallel,
            data=data,
        )
        assert [r.loss for r in records] == pytest.approx([r.loss for r in one], rel=2e-5), name
        assert [r.mtp_loss for r in records] == pytest.approx(
            [r.mtp_loss for r in one], rel=2e-5
        ), name
        for what in ("tokens", "counted_tokens", "epoch"):
            assert [getattr(r, what) for r in records] == [getattr(r, what) for r in one], name
        flops = [r.tflops_per_device * r.seconds * r.num_devices for r in records]
        assert flops == pytest.approx([r.tflops_per_device * r.seconds for r in one]), name
        after = load_file(tmp_path / name / "out" / "model.safetensors")
        assert after.keys() == expected.keys()
        for key, weight in expected.items():
            moved, wanted = after[key] - before[key], weight - before[key]
            error = (moved - wanted).norm() / wanted.norm().clamp(min=1e-12)
            assert error < 1e-3 or torch.equal(moved, wanted), f"{name}: {key}: {error:.1e}"
    assert (tmp_path / "CP2, chat files" / "log" / "data" / "train" / "manifest.json").is_file()
