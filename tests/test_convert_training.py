"""Checkpoints that the trainer saves, converted: weights as they are, masters in all their bits."""

from pathlib import Path

import hf_reference
import pytest
import torch
from tiny_engine import make_engine, make_job, train_step

from megatron_dsv3.checkpoint.saver import Saver
from megatron_dsv3.commands.assemble import Engine
from megatron_dsv3.convert.sources import MegatronSource
from megatron_dsv3.convert.tensors import pieces_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory, groups) -> tuple[Engine, Path]:
    """After two steps in bf16, whose masters differ from the weights."""
    folder = tmp_path_factory.mktemp("training")
    hf_dir = hf_reference.build().save(folder / "hf", dtype=torch.bfloat16)
    job = make_job(hf_dir, precision={"compute": "bf16"}, checkpoint={"asynchronous": False})
    engine = make_engine(job, groups)
    for number in range(2):
        train_step(engine, number)
    engine.step.settle()
    saver = Saver(engine.trainee, folder, job.checkpoint, lambda line: None)
    saver.save(2, {"step": engine.step.state()}, wait=True)
    saver.finish()
    return engine, folder / "iter_0000002"


def test_weights_of_a_training_are_those_of_the_model(trained):
    engine, directory = trained
    source = MegatronSource.open(directory, engine.bridge.arch, source="weights")
    expected = dict(engine.bridge.export(dtype=torch.bfloat16))
    assert source.infos().keys() <= expected.keys()
    for name, info in source.infos().items():
        assert info.dtype == expected[name].dtype, name
        assert torch.equal(source.read(name), expected[name]), name


def test_masters_of_a_training_are_those_of_its_optimizer(trained):
    engine, directory = trained
    source = MegatronSource.open(directory, engine.bridge.arch, source="master")
    rounded = 0
    for param, tensor in engine.bridge.local_tensors():
        if param.is_buffer:
            assert torch.equal(source.read(param.hf[0]), tensor)
            continue
        master = tensor.main_param.detach().view(tensor.shape)
        for name, piece in zip(param.hf, pieces_of(param, master, 1), strict=True):
            found = source.read(name)
            assert found.dtype == torch.float32
            assert torch.equal(found, piece), name
            rounded += not torch.equal(found, piece.bfloat16().float())
    assert rounded > 50, "masters must not be the weights, or this shows nothing"
