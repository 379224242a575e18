"""The command-line check of a Hugging Face directory."""

import subprocess
import sys
from pathlib import Path

import hf_reference
import pytest
from safetensors.torch import load_file, save_file

TOOL = Path(__file__).parents[1] / "tools" / "checkpoint" / "check.py"


@pytest.fixture
def hf_dir(tmp_path) -> Path:
    return hf_reference.build().save(tmp_path / "hf")


def _check(hf_dir: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", str(TOOL), str(hf_dir)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_a_whole_directory_is_told(hf_dir):
    done = _check(hf_dir)
    assert done.returncode == 0
    num_tensors = len(hf_reference.read(hf_dir))
    assert f"whole; {num_tensors} tensors, 0 of them in FP8 blocks" in done.stdout


def test_a_copy_that_differs_is_named(hf_dir):
    tensors = load_file(hf_dir / "model.safetensors")
    name = "model.layers.3.shared_head.head.weight"
    tensors[name][0] += 1
    save_file(tensors, hf_dir / "model.safetensors")
    done = _check(hf_dir)
    assert done.returncode == 2
    assert name in done.stderr
    assert "lm_head.weight" in done.stderr
    assert "Traceback" not in done.stderr
