"""`megatron-dsv3 verify A B` as it is called: what it prints, and its exit codes."""

import subprocess
import sys
from pathlib import Path

import hf_reference
import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory) -> Path:
    return hf_reference.build().save(tmp_path_factory.mktemp("verify") / "hf")


def verify(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron_dsv3.cli", "verify", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_same_checkpoint_passes(hf_dir):
    done = verify(hf_dir, hf_dir)
    assert done.returncode == 0, done.stderr
    assert "the same, bit for bit" in " ".join(done.stdout.split())


def test_a_difference_is_told_with_place_and_exit_code_1(hf_dir, tmp_path):
    tensors = load_file(hf_dir / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name][7, 2] += 1
    (tmp_path / "config.json").write_text((hf_dir / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    done = verify(hf_dir, tmp_path)
    assert done.returncode == 1
    assert f"{name}[7, 2]" in done.stdout
    assert "differ" in done.stdout
    assert "Traceback" not in done.stderr
    assert verify(hf_dir, tmp_path, "--tolerance", "10").returncode == 0


def test_what_is_no_checkpoint_is_one_message(hf_dir, tmp_path):
    done = verify(hf_dir, tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "expected a checkpoint with model.safetensors.index.json" in done.stderr
