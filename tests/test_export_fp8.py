"""A training that writes FP8 writes what the converter makes of its checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_job import write_chats, write_job, write_model

TOOL = Path(__file__).resolve().parents[1] / "tools" / "checkpoint" / "convert.py"


@pytest.mark.slow
@pytest.mark.parametrize("mtp", ["train", "off"])
def test_a_runs_fp8_is_the_converters(run, tmp_path, mtp):
    job = write_job(
        tmp_path,
        write_model(tmp_path / "model", num_mtp_layers=1),
        write_chats(tmp_path / "chats.jsonl"),
        train={"num_steps": 1},
        mtp={"mode": mtp},
        output={"dtype": "fp8"},
    )
    code, _, err = run("train", job)
    assert code == 0, err
    written = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert any(name.endswith("_scale_inv") for name in written)
    if mtp == "off":  # its layer comes from the model, not from the checkpoint
        return
    checkpoint = tmp_path / "out-checkpoints" / "iter_0000001"
    command = [sys.executable, "-W", "ignore", str(TOOL), "--to", "hf", "--from", str(checkpoint)]
    command += ["--hf-template", str(tmp_path / "model"), "--out", str(tmp_path / "converted")]
    subprocess.run([*command, "--dtype", "fp8"], check=True, capture_output=True, timeout=120)
    [file] = (tmp_path / "converted").glob("*.safetensors")
    expected = load_file(file)
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype, name
        assert written[name].float().equal(tensor.float()), name
