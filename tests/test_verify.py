"""`verify` and `train.verify_first` from the command line."""

import shutil
from pathlib import Path

import hf_reference
import pytest
from safetensors.torch import save_file
from small_job import write_chats, write_job, write_model

from megatron_dsv3.convert.bridge import Bridge
from megatron_dsv3.train.metrics import read_metrics

WRONG = "model.layers.1.mlp.shared_experts.up_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def job(model, tmp_path) -> Path:
    return write_job(tmp_path, model, write_chats(tmp_path / "chats.jsonl"))


def test_verify_says_that_the_model_is_transformers_and_keeps_its_data(run, model, job, tmp_path):
    """The store of the chat files stays where the training looks for it."""
    before = set(tmp_path.iterdir())
    code, out, err = run("verify", model, job, "mtp.mode=off")
    assert (code, err) == (0, "")
    assert "layer 1" in out
    assert "MTP" not in out
    assert out.endswith("the model is transformers'\n")
    assert set(tmp_path.iterdir()) - before == {tmp_path / "log"}
    assert {path.name for path in (tmp_path / "log").iterdir()} == {"data"}


def test_verify_needs_no_empty_output(run, model, job, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    assert run("verify", model, job)[0] == 0


def test_verify_names_the_layer_in_which_another_directory_differs(run, model, job, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    tensors = hf_reference.read(other)
    tensors[WRONG] *= 1.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    code, out, err = run("verify", other, job)
    assert code == 2
    assert "Parity with transformers" in out
    assert err.startswith(f"error: the model differs from transformers' on {other}, first in ")
    assert "layer 1 (model.layers.1): relative error" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [("nothing", "nothing: expected a checkpoint with"), ("job.txt", "expected a job file")],
)
def test_what_verify_cannot_use_is_refused(run, model, job, tmp_path, other, message):
    arguments = (model, tmp_path / other) if "." in other else (tmp_path / other, job)
    code, _, err = run("verify", *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_training_starts_after_the_gate_and_is_what_it_is_without(run, job, tmp_path):
    code, out, _ = run("train", job, f"log.dir={tmp_path / 'plain'}")
    assert code == 0
    assert "Parity" not in out
    for left in ("out", "out-checkpoints"):
        shutil.rmtree(tmp_path / left)
    code, out, _ = run("train", job, "train.verify_first=true")
    assert code == 0
    assert out.index("Parity with transformers") < out.index("step 1/")
    gated, plain = (read_metrics(tmp_path / name) for name in ("log", "plain"))
    assert [(r.loss, r.grad_norm) for r in gated] == [(r.loss, r.grad_norm) for r in plain]


def test_a_model_that_is_wrong_is_not_trained(run, job, tmp_path, monkeypatch):
    original = Bridge._fill

    def fill(self, param, tensor, reader) -> None:
        original(self, param, tensor, reader)
        if WRONG in param.hf:
            tensor.data.mul_(1.01)

    monkeypatch.setattr(Bridge, "_fill", fill)
    code, out, err = run("train", job, "train.verify_first=true")
    assert code == 2
    assert "first in layer 1 (model.layers.1)" in err
    assert "step 1/" not in out
    assert not (tmp_path / "out").exists()
    assert {path.name for path in (tmp_path / "log").iterdir()} == {"data"}
