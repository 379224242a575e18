"""A run that is killed, warned or starved of disk ends with the weights of an undisturbed one.

The real command, in processes of its own that are really killed.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import cli_children
import pytest
import yaml
from safetensors.torch import load_file
from small_job import write_chats, write_job, write_model

from megatron_dsv3.checkpoint.directory import find_newest
from megatron_dsv3.train.signals import REQUEUE

pytestmark = pytest.mark.slow
NUM_STEPS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("inputs")
    write_model(place / "model", hidden_size=16, kv_lora_rank=8, q_lora_rank=8)
    write_chats(place / "chats.jsonl")
    return place


def _job(inputs: Path, directory: Path, **sections) -> str:
    directory.mkdir(exist_ok=True)
    checkpoint = {"every_steps": 1, **sections.pop("checkpoint", {})}
    path = write_job(
        directory,
        inputs / "model",
        inputs / "chats.jsonl",
        train={"global_batch_size": 2, "device": "cpu", "num_epochs": 2},
        checkpoint=checkpoint,
        experts={"bias": "update"},
        **sections,
    )
    return str(path)


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> tuple[Path, float]:
    """Output of a whole run, and its seconds."""
    directory = tmp_path_factory.mktemp("undisturbed")
    job = _job(inputs, directory)
    cli_children.run(["train", job, "train.num_steps=1", f"output.dir={directory}/warm"],
                     directory / "warm.txt")  # fmt: skip
    began = time.monotonic()
    assert cli_children.run(["train", job], directory / "said.txt") == 0, _said(directory)
    return directory / "out", time.monotonic() - began


def _said(directory: Path) -> str:
    return (directory / "said.txt").read_text()


def _steps(directory: Path) -> list[int]:
    lines = (directory / "log" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def _assert_same(one: Path, other: Path) -> None:
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert files
    for name in files:
        tensors, others = load_file(one / name), load_file(other / name)
        assert tensors.keys() == others.keys()
        assert [key for key in tensors if not tensors[key].equal(others[key])] == []


def _kill_and_go_on(inputs: Path, undisturbed, directory: Path, seeds: range) -> tuple[str, int]:
    """One run, killed once a seed at a random moment, then left to end: what it said, and kills."""
    reference, seconds = undisturbed
    num_killed = 0
    job = _job(inputs, directory)
    for seed in seeds:
        log = directory / "said.txt"
        process = cli_children.start(["train", job], log, slow_writes_s=0.2 * (seed % 2))
        time.sleep(random.Random(seed).uniform(0.2, 0.8 * seconds))
        process.kill()
        process.join()
        num_killed += process.exitcode == -signal.SIGKILL
        if (directory / "out").exists():
            break
    if not (directory / "out").exists():
        assert cli_children.run(["train", job], directory / "said.txt") == 0, _said(directory)
    _assert_same(reference, directory / "out")
    return _said(directory), num_killed


def test_killed_at_random_moments_it_ends_with_the_same_weights(inputs, undisturbed, tmp_path):
    said, num_killed = _kill_and_go_on(inputs, undisturbed, tmp_path / "run", range(4))
    assert "Traceback" not in said
    assert num_killed >= 2


@pytest.mark.wide
@pytest.mark.parametrize("seed", range(100, 130))
def test_killed_at_thirty_random_moments(inputs, undisturbed, tmp_path, seed):
    _, num_killed = _kill_and_go_on(inputs, undisturbed, tmp_path / "run", range(seed, seed + 1))
    assert num_killed == 1


def test_killed_during_a_save_it_says_what_it_ignored(inputs, undisturbed, tmp_path):
    job = _job(inputs, tmp_path)
    folder, log = tmp_path / "out-checkpoints", tmp_path / "said.txt"
    process = cli_children.start(["train", job], log, slow_writes_s=0.5)
    cli_children.wait_for("saved ", log, process)
    while not list(folder.glob("*.incomplete-*/*.distcp")):  # the next one is being written
        time.sleep(0.005)
    process.kill()
    process.join()
    [incomplete] = folder.glob("*.incomplete-*")
    before = find_newest(folder)
    assert before.path is not None
    time.sleep(0.7)  # its writer has gone with it
    assert not (incomplete / "manifest-00000.part").exists()
    assert cli_children.run(["train", job], log) == 0, log.read_text()
    said = log.read_text()
    assert f"ignored checkpoint {incomplete.name}: the save did not finish" in said
    assert f"resumed from {before.path}" in said
    assert not incomplete.exists()
    _assert_same(undisturbed[0], tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warned_run_saves_and_asks_to_be_started_again(inputs, undisturbed, tmp_path, number):
    job = _job(inputs, tmp_path, checkpoint={"every_steps": 100})
    log, folder = tmp_path / "said.txt", tmp_path / "out-checkpoints"
    process = cli_children.start(["train", job], log)
    cli_children.wait_for("step 2/6", log, process)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == REQUEUE == 75, log.read_text()
    last = _steps(tmp_path)[-1]
    assert 2 <= last < NUM_STEPS
    assert find_newest(folder).path == folder / f"iter_{last:07}"
    assert (folder / "requeue").read_text() == f"{last}\n"
    assert f"{number.name}: stopped after step {last}" in log.read_text()
    assert cli_children.run(["train", job], log) == 0, log.read_text()
    assert _steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert not (folder / "requeue").exists()
    _assert_same(undisturbed[0], tmp_path / "out")


def test_a_damaged_checkpoint_is_passed_over(inputs, undisturbed, tmp_path):
    job = _job(inputs, tmp_path, checkpoint={"keep_last": 6})
    log, folder = tmp_path / "said.txt", tmp_path / "out-checkpoints"
    process = cli_children.start(["train", job], log)
    cli_children.wait_for("iter_0000004 in", log, process)
    process.kill()
    process.join()
    newest = find_newest(folder).path
    victim = newest / "__0_0.distcp"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert cli_children.run(["train", job], log) == 0
    said = log.read_text()
    assert f"ignored checkpoint {newest.name}: __0_0.distcp is damaged" in said
    _assert_same(undisturbed[0], tmp_path / "out")


def test_another_training_does_not_go_on_from_these_checkpoints(inputs, tmp_path):
    job = _job(inputs, tmp_path)
    log = tmp_path / "said.txt"
    assert cli_children.run(["train", job, "train.num_steps=1"], log) == 0
    others = ["train.num_steps=1", "optimizer.lr=5e-4", f"output.dir={tmp_path}/out2",
              f"checkpoint.dir={tmp_path}/out-checkpoints"]  # fmt: skip
    assert cli_children.run(["train", job, *others], log) == 2
    assert (
        "of another training: optimizer.lr was 0.001, is 0.0005; set them back" in log.read_text()
    )
    assert not (tmp_path / "out2").exists()


def test_weights_are_exported_on_the_way(inputs, tmp_path):
    job = _job(inputs, tmp_path, checkpoint={"every_steps": 3, "export_hf_every_steps": 2})
    log = tmp_path / "said.txt"
    assert cli_children.run(["train", job, "train.num_steps=3"], log) == 0, log.read_text()
    exported = tmp_path / "out-step2"
    shorter = yaml.safe_load(Path(job).read_text())
    assert shorter["output"]["dir"] == str(tmp_path / "out")
    assert (
        load_file(exported / "model.safetensors").keys()
        == load_file(tmp_path / "out" / "model.safetensors").keys()
    )
