"""Checkpoints of a model on a GPU: what is loaded has the bits of the moment of the save.

Training goes on while the writer process, forked from one that uses CUDA, writes the copy.
"""

from pathlib import Path
from typing import Any

import hf_reference
import pytest
import torch
from hf_reference import REAL_HEADS
from tiny_engine import differences, make_engine, make_job, optimizer_state, train_step, weights

from megatron_dsv3.checkpoint.saver import Saver
from megatron_dsv3.checkpoint.store import load
from megatron_dsv3.commands.verify_checkpoint import verify_checkpoint

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("hf")
    return hf_reference.build(**REAL_HEADS).save(directory, dtype=torch.bfloat16)


@pytest.mark.parametrize("optimizer", [{}, {"moments": "bf16"}, {"offload_fraction": 1.0}], ids=str)
def test_an_asynchronous_save_holds_the_bits_of_its_moment(groups, hf_dir, tmp_path, optimizer):
    sections: dict[str, Any] = {"precision": {"compute": "bf16"}, "train": {"device": "cuda"}}
    job = make_job(hf_dir, optimizer={**optimizer}, **sections)
    engine = make_engine(job, groups)
    for number in range(2):
        train_step(engine, number)
    held, states = weights(engine), optimizer_state(engine)
    told: list[str] = []
    saver = Saver(engine.trainee, tmp_path, job.checkpoint, told.append)
    saver.save(2, {"step": engine.step.state()})
    losses = [train_step(engine, number) for number in (2, 3)]
    saver.finish()
    assert "saved" in told[0]
    assert differences(weights(engine), held)
    verify_checkpoint(tmp_path / "iter_0000002")
    other = make_engine(job, groups, load=False)
    loaded = load(other.trainee, tmp_path / "iter_0000002")
    assert loaded.exact_rng
    assert not differences(weights(other), held)
    assert not differences(optimizer_state(other), states)
    again = [train_step(other, number) for number in (2, 3)]
    # Sums by atomics come in any order.
    assert again == pytest.approx(losses, rel=1e-3)
