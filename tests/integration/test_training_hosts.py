"""The script that trains on hosts without slurm, over pdsh and over ssh alone.

Both hosts are this machine. ssh is a stand-in that runs its command here.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from environment import ROOT, apt_install, command_lines, free_port, stand_in_ssh
from training import assert_same, write_inputs
from training import options as own_options

SCRIPT = str(ROOT / "examples" / "train_dsv3_pdsh.sh")
HOSTS = "127.0.0.1,localhost"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def ssh(tmp_path) -> dict[str, str]:
    path = stand_in_ssh(tmp_path / "bin")
    return os.environ | {"PATH": path, "GLOO_SOCKET_IFNAME": "lo", "TORCHDYNAMO_DISABLE": "1"}


def _command(inputs: Path, runs: Path, *words: str) -> list[str]:
    own = [*own_options(inputs, runs, "hosts"), f"--port={free_port()}", *words]
    return ["bash", SCRIPT, HOSTS, *own]


def test_two_hosts_are_checked_warned_and_go_on_to_the_same_end(inputs, ssh, tmp_path):
    """First over pdsh, then over ssh alone; the peer is one undisturbed run on one host."""
    apt_install(("pdsh", "pdsh"))
    said = tmp_path / "said"
    with said.open("w") as log:
        process = subprocess.Popen(_command(inputs, tmp_path), stdout=log, stderr=log, env=ssh)
        try:
            end = time.monotonic() + 240
            while "step 3/" not in said.read_text():
                assert process.poll() is None, said.read_text()[-6000:]
                assert time.monotonic() < end, said.read_text()[-6000:]
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 75, said.read_text()[-6000:]
        finally:
            process.kill()
    text = said.read_text()
    assert "SIGTERM: the run is told to save and stop" in text
    assert text.count("fit") == 2
    assert "localhost: " in text
    assert not list(Path("/tmp").glob(f"train-dsv3-*-{process.pid}.*"))
    # Without pdsh: a folder of links to all programs but it.
    programs = tmp_path / "programs"
    programs.mkdir()
    for program in Path("/usr/bin").iterdir():
        if program.name != "pdsh":
            (programs / program.name).symlink_to(program)
    ssh["PATH"] = f"{tmp_path / 'bin'}:{programs}"
    done = subprocess.run(
        _command(inputs, tmp_path, "--no-preflight"),
        capture_output=True, text=True, env=ssh, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "127.0.0.1: resumed from" in done.stdout
    peer = ["bash", str(ROOT / "examples" / "train_dsv3_671b.sh"), "--here", "--processes=2"]
    peer += [*own_options(inputs, tmp_path, "peer"), f"--port={free_port()}", "--no-preflight"]
    subprocess.run(peer, check=True, env=ssh, stdout=subprocess.DEVNULL, timeout=300)
    assert_same(tmp_path / "hosts" / "model", tmp_path / "peer" / "model")


def test_ctrl_c_ends_it_on_all_hosts(inputs, ssh, tmp_path):
    apt_install(("pdsh", "pdsh"))
    said = tmp_path / "said"
    with said.open("w") as log:
        command = _command(inputs, tmp_path, "--no-preflight")
        process = subprocess.Popen(command, stdout=log, stderr=log, env=ssh)
        try:
            end = time.monotonic() + 60
            while not (ranks := command_lines(str(tmp_path / "hosts" / "job.yaml"))):
                assert time.monotonic() < end, said.read_text()[-6000:]
                time.sleep(0.2)
            assert ranks
            process.send_signal(signal.SIGINT)
            assert process.wait(120) == 130, said.read_text()[-6000:]
        finally:
            process.kill()
    assert command_lines(str(tmp_path / "hosts" / "job.yaml")) == []


def test_a_host_that_fails_is_the_failure(inputs, ssh, tmp_path):
    words = ("--python=/bin/false", "--no-preflight")
    done = subprocess.run(
        _command(inputs, tmp_path, *words), capture_output=True, text=True, env=ssh, check=False,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "without a new checkpoint (newest: none): not started again" in done.stdout
