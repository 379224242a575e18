"""Checkpoints in one process: exact resume, what a full disk and a lost mount do, what is kept."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf_reference
import pytest
import torch
from megatron.core import dist_checkpointing
from tiny_engine import (
    differences,
    make_engine,
    make_job,
    optimizer_state,
    train_step,
    weights,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_dsv3.checkpoint.directory import LATEST, checkpoints, find_newest
from megatron_dsv3.checkpoint.headers import read_metadata
from megatron_dsv3.checkpoint.saver import Saver
from megatron_dsv3.checkpoint.store import load
from megatron_dsv3.checkpoint.writer import SaveError
from megatron_dsv3.commands.assemble import Engine
from megatron_dsv3.commands.verify_checkpoint import verify_checkpoint
from megatron_dsv3.config.sections import CheckpointSection


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory) -> Path:
    reference = hf_reference.build(num_hidden_layers=2, num_mtp_layers=1)
    return reference.save(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def engine(groups, hf_dir) -> Engine:
    """Trained for one step; tests do not change it."""
    engine = make_engine(make_job(hf_dir), groups)
    train_step(engine, 0)
    return engine


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """Holds one checkpoint of the tiny model, not two."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)


def _saver(engine: Engine, folder: Path, **section: Any) -> tuple[Saver, list[str]]:
    told: list[str] = []
    return Saver(engine.trainee, folder, CheckpointSection(**section), told.append), told


def _save(saver: Saver, step: int) -> None:
    saver.save(step, {"position": step}, wait=True)
    saver.finish()


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_six_steps_are_three_and_three_bit_for_bit(groups, hf_dir, tmp_path, compute, asynchronous):
    job = make_job(hf_dir, precision={"compute": compute})
    whole = make_engine(job, groups)
    losses = [train_step(whole, n) for n in range(3)]
    saver, _ = _saver(whole, tmp_path / "c", asynchronous=asynchronous)
    saver.save(3, {"step": whole.step.state()})
    losses += [train_step(whole, n) for n in range(3, 6)]  # while the files are written
    saver.finish()
    rest = make_engine(job, groups, load=False)
    loaded = load(rest.trainee, tmp_path / "c" / "iter_0000003")
    rest.step.restore(loaded.own["step"])
    assert (loaded.step, loaded.exact_rng) == (3, True)
    assert [train_step(rest, n) for n in range(3, 6)] == losses[3:]
    assert not differences(weights(whole), weights(rest))
    assert not differences(optimizer_state(whole), optimizer_state(rest))
    assert rest.step.experts.drift() == whole.step.experts.drift()
    assert max(rest.step.experts.drift().values()) > 1e-3


def test_random_states_go_on_where_they_were(engine, groups, hf_dir, tmp_path):
    saver, _ = _saver(engine, tmp_path)
    _save(saver, 1)
    expected = torch.rand(3)
    torch.manual_seed(99)
    load(make_engine(make_job(hf_dir), groups).trainee, tmp_path / "iter_0000001")
    assert torch.equal(torch.rand(3), expected)


def test_stock_code_reads_every_tensor_of_a_checkpoint(engine, tmp_path):
    _save(_saver(engine, tmp_path)[0], 1)
    path = tmp_path / "iter_0000001"
    stored = dist_checkpointing.load_plain_tensors(str(path))
    held = weights(engine)
    assert torch.equal(
        stored["embedding.word_embeddings.weight"], held["embedding.word_embeddings.weight"]
    )
    masters = "optimizer.state.param.embedding.word_embeddings.weight"
    assert torch.equal(stored[masters], held["embedding.word_embeddings.weight"])
    common = dist_checkpointing.load_common_state_dict(str(path))
    assert common["iteration"] == 1
    assert common["opt_param_scheduler"]["num_steps"] == 1
    assert (tmp_path / LATEST).read_text() == "1\n"


def test_files_say_nothing_of_pinned_memory(engine, tmp_path, monkeypatch):
    """As it is on a GPU, whose tensors come to the host that way."""
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda *_: True)
    _save(_saver(engine, tmp_path)[0], 1)
    stored = read_metadata(tmp_path / "iter_0000001").state_dict_metadata.values()
    tensors = [item for item in stored if isinstance(item, TensorStorageMetadata)]
    assert len(tensors) > 50
    assert not any(tensor.properties.pin_memory for tensor in tensors)


def test_weights_alone_can_be_loaded(engine, groups, hf_dir, tmp_path):
    saver, told = _saver(engine, tmp_path, keep_last=1, keep_weights_every=2)
    for step in (1, 2, 3):
        _save(saver, step)
    assert [path.name for path in checkpoints(tmp_path)] == ["iter_0000003"]
    kept = tmp_path / "weights" / "iter_0000002"
    assert [path.name for path in kept.parent.iterdir()] == ["iter_0000002"]
    assert "iter_0000002: kept its weights, dropped the optimizer" in told
    assert not verify_checkpoint(kept).has_optimizer
    assert verify_checkpoint(tmp_path / "iter_0000003").has_optimizer
    other = make_engine(make_job(hf_dir), groups)
    assert differences(weights(other), weights(engine))
    load(other.trainee, kept, optimizer=False)
    assert not differences(weights(other), weights(engine))
    with pytest.raises(ValueError, match="holds weights alone"):
        load(other.trainee, kept)


def test_another_models_checkpoint_is_refused(engine, groups, tmp_path):
    _save(_saver(engine, tmp_path)[0], 1)
    deeper = hf_reference.build(num_hidden_layers=3, num_mtp_layers=1).save(tmp_path / "hf3")
    with pytest.raises(ValueError, match=r"not a checkpoint of this model|[Ss]hape"):
        load(make_engine(make_job(deeper), groups).trainee, tmp_path / "iter_0000001")
    no_mtp = hf_reference.build(num_hidden_layers=2, num_mtp_layers=0).save(tmp_path / "hf0")
    with pytest.raises(ValueError, match=r"holds .*mtp\.layers.* besides"):
        load(make_engine(make_job(no_mtp), groups).trainee, tmp_path / "iter_0000001")


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_keeps_the_older_checkpoint(engine, small_disk, asynchronous):
    saver, told = _saver(engine, small_disk, asynchronous=asynchronous)
    _save(saver, 1)
    _save(saver, 2)
    assert "NOT SAVED" in told[-1]
    assert "No space left on device" in told[-1]
    assert "newest of this run: iter_0000001" in told[-1]
    found = find_newest(small_disk)
    assert found.path == small_disk / "iter_0000001"
    assert "iter_0000002" in found.ignored[0]
    verify_checkpoint(found.path)


def test_a_run_stops_at_a_failed_save_where_the_job_says_so(engine, small_disk):
    saver, _ = _saver(engine, small_disk, on_save_error="stop")
    _save(saver, 1)
    with pytest.raises(SaveError, match=r"checkpoint of step 2.*No space left"):
        _save(saver, 2)


def test_a_folder_that_became_read_only_keeps_the_older_checkpoint(engine, small_disk):
    saver, told = _saver(engine, small_disk)
    _save(saver, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    _save(saver, 2)
    assert "Read-only file system" in told[-1]
    verify_checkpoint(small_disk / "iter_0000001")


def test_nothing_is_written_below_a_mount_that_is_gone(engine, small_disk):
    saver, told = _saver(engine, small_disk)
    _save(saver, 1)
    subprocess.run(["umount", "-l", str(small_disk)], check=True)
    _save(saver, 2)
    assert "is the mount gone?" in told[-1]
    assert not list(small_disk.iterdir())


def test_a_folder_that_vanishes_while_files_are_written_is_reported(engine, tmp_path):
    saver, told = _saver(engine, tmp_path / "c")
    _save(saver, 1)
    saver.save(2, {})
    (tmp_path / "c").rename(tmp_path / "elsewhere")
    saver.finish()
    assert "NOT SAVED" in told[-1]
    verify_checkpoint(tmp_path / "elsewhere" / "iter_0000001")


def test_a_save_goes_on_after_one_that_failed(engine, tmp_path):
    folder = tmp_path / "c"
    folder.write_text("in the way")
    saver, told = _saver(engine, folder)
    _save(saver, 1)
    assert "NOT SAVED" in told[-1]
    assert "no checkpoint yet" in told[-1]
    folder.unlink()
    _save(saver, 2)
    verify_checkpoint(folder / "iter_0000002")


def test_a_writer_that_is_killed_is_reported(engine, tmp_path):
    saver, told = _saver(engine, tmp_path)
    saver.save(1, {})
    [active] = saver._queue.async_calls
    os.kill(active.async_caller.process.pid, 9)
    saver.finish()
    assert "NOT SAVED" in told[-1] or "saved" in told[-1]  # it may have been done already
    if "NOT SAVED" in told[-1]:
        assert find_newest(tmp_path).path is None


def test_the_second_save_waits_for_the_first(engine, tmp_path):
    saver, _ = _saver(engine, tmp_path, keep_last=5)
    for step in (1, 2, 3):
        saver.save(step, {})
        assert len(saver._queue.async_calls) == 1
    saver.finish()
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["1", "2", "3"]
