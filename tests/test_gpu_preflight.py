"""The pre-flight on a GPU: its report, and bandwidth through NCCL where there are several."""

import json
import subprocess
import sys

import pytest
import torch
from small_job import write_chats, write_job, write_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_gpus_are_counted_and_their_links_measured(tmp_path, num_gpus):
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs")
    job = write_job(
        tmp_path,
        write_model(tmp_path / "model"),
        write_chats(tmp_path / "chats.jsonl"),
        train={"device": "cuda"},
        precision={"compute": "bf16"},
        parallel={"ep_size": num_gpus},
    )
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={num_gpus}", "-m", "megatron_dsv3.cli", "preflight", str(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fit" in done.stdout
    assert ("all-to-all of tokens (ep): slowest" in done.stdout) == (num_gpus > 1)
    report = [sys.executable, "-W", "ignore", "-m", "megatron_dsv3.cli", "preflight", str(job)]
    report += ["--step", "report", "--dir", str(tmp_path / "r"), "--node", "here"]
    subprocess.run(report, check=True, timeout=300)
    devices = json.loads((tmp_path / "r" / "here.json").read_text())["devices"]
    assert len(devices) == torch.cuda.device_count()
    assert devices[0]["name"] == torch.cuda.get_device_name(0)
