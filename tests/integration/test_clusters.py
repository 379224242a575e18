"""The scripts that serve over several nodes: on a real slurm of two nodes, and over pdsh.

All nodes are this machine. ssh is a stand-in that runs its command here.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from environment import (
    ON_CPU,
    ROOT,
    SERVING,
    apt_install,
    command_lines,
    free_port,
    read_until,
    run_within,
    stand_in_ssh,
    started,
    vllm_python,
)  # fmt: skip

from megatron_dsv3.serve.client import ask, is_ready

SLURM = Path(__file__).with_name("slurm.sh")
READY_SECONDS = 180


@pytest.fixture
def options(models) -> dict[str, str]:
    """Options of either script: TP2, one device on each of two nodes."""
    return {
        "--tp": "2",
        "--pp": "1",
        "--cli": f"{sys.executable} -W ignore -m megatron_dsv3.cli",
        "--python": vllm_python(),
        "--port": str(free_port()),
        "--main-port": str(free_port()),
        "--max-model-len": "128",
        "--ready-seconds": str(READY_SECONDS),
    }


def _words(options: dict[str, str]) -> list[str]:
    return [word for pair in options.items() for word in pair] + list(ON_CPU)


def _environment(**more: str) -> dict[str, str]:
    loopback = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    return os.environ | SERVING | loopback | {"PYTHONPATH": str(ROOT)} | more


def _servers(hf_dir: Path) -> list[str]:
    """Command lines of processes that serve this directory."""
    return command_lines(str(hf_dir), "vllm.entrypoints.cli.main")


def _check_and_follow_curl(log: str, url: str) -> None:
    """The answer is the one learned, and the printed line gets one too."""
    answer = ask(url, question="What is 2 + 2?", max_tokens=40, api_key="secret")
    assert answer.content.strip() == "It is 4."
    line = re.search(r"curl .*/v1/chat/completions -d '.*'", log)
    assert line, log[-2000:]
    words = ["bash", "-c", line[0].replace("curl", "curl --silent --fail --max-time 60", 1)]
    done = subprocess.check_output(words, env=os.environ | {"VLLM_API_KEY": "secret"}, text=True)
    assert '"choices"' in done


# ---- slurm --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Environment of a cluster of four nodes with eight devices each, as slurm counts them."""
    apt_install(("slurmctld", "slurm-wlm"), ("munged", "munge"), ("curl", "curl"))
    root = tmp_path_factory.mktemp("slurm")
    up = ["bash", str(SLURM), "up", str(root), "4", "8", str(free_port())]
    try:
        done = run_within(120, up)
        assert done.returncode == 0, done.stderr
        yield _environment(SLURM_CONF=str(root / "slurm.conf"), VLLM_API_KEY="secret")
    finally:
        run_within(120, ["bash", str(SLURM), "down", str(root)])


def _slurm(slurm: dict[str, str], *command: str) -> str:
    done = run_within(60, command, env=slurm)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _state(job: str, slurm: dict[str, str]) -> str:
    return _slurm(slurm, "squeue", "-h", "--states=all", "--jobs", job, "--format", "%T")


@pytest.mark.parametrize(("options", "nodes"), [([], 4), (["--nodes=2"], 2)])
def test_the_slurm_script_takes_all_devices_of_its_nodes(slurm, tmp_path, options, nodes):
    """4 nodes x 8 in BF16, 2 x 8 in FP8; a stage on each node. What is asked for is printed."""
    program, log = tmp_path / "show", tmp_path / "log"
    program.write_text('#!/bin/sh\nprintf "[%s]" "$@"\necho " on $SLURMD_NODENAME"\n')
    program.chmod(0o755)
    command = ["sbatch", "--parsable", *options, f"--output={log}"]
    command += [str(ROOT / "examples" / "serve_dsv3_slurm.sh"), "/models/it's"]
    job = _slurm(slurm, *command, "--cli", str(program), "--name", "two words")
    end = time.monotonic() + 60
    while _state(job, slurm) != "COMPLETED":
        assert time.monotonic() < end, (_state(job, slurm), log.read_text())
        time.sleep(0.2)
    assert sorted(log.read_text().splitlines()) == [
        f"{rank}: [serve][run][/models/it's][--python][python3][--tp][8][--pp][{nodes}]"
        f"[--nodes][{nodes}][--main-address][node1][--main-port][29501][--name][two words]"
        f"[--node-rank][{rank}] on node{rank + 1}"
        for rank in range(nodes)
    ]


def test_slurm_serves_over_two_nodes_and_scancel_ends_all(slurm, models, options, tmp_path):
    hf_dir, log = models / "fp32", tmp_path / "log"
    command = ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=1", f"--output={log}"]
    command += [str(ROOT / "examples" / "serve_dsv3_slurm.sh"), str(hf_dir), *_words(options)]
    job = _slurm(slurm, *command)
    end = time.monotonic() + READY_SECONDS
    while "curl " not in (text := log.read_text() if log.exists() else ""):
        assert _state(job, slurm) in ("PENDING", "CONFIGURING", "RUNNING"), text[-4000:]
        assert time.monotonic() < end, text[-4000:]
        time.sleep(1)
    assert len(_servers(hf_dir)) >= 2
    assert re.search(r"^1: .*--headless", text, re.MULTILINE), "the second node only computes"
    _check_and_follow_curl(text, f"http://127.0.0.1:{options['--port']}")
    _slurm(slurm, "scancel", job)
    while _state(job, slurm) in ("RUNNING", "COMPLETING"):
        assert time.monotonic() < end + 120
        time.sleep(0.5)
    assert "SIGTERM: ending the server" in log.read_text()
    assert _servers(hf_dir) == []


def test_the_slurm_script_without_slurm_or_model_says_so():
    script = str(ROOT / "examples" / "serve_dsv3_slurm.sh")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    for arguments, said in ((["/m"], "start this script with sbatch"), ([], "HF_DIR [option ...]")):
        done = run_within(20, ["bash", script, *arguments], env=environment)
        assert done.returncode != 0
        assert said in done.stderr


# ---- pdsh ---------------------------------------------------------------------------------------


def test_a_host_that_fails_is_the_pdsh_scripts_failure(ssh):
    script = str(ROOT / "examples" / "serve_dsv3_pdsh.sh")
    command = ["bash", script, "a,b", "/m", "--cli", "/bin/false"]
    assert run_within(60, command, env=ssh).returncode == 1


@pytest.fixture
def ssh(tmp_path) -> dict[str, str]:
    """Environment whose ssh runs here what it is told to run elsewhere, without the terminal."""
    apt_install(("pdsh", "pdsh"), ("curl", "curl"))
    return _environment(PATH=stand_in_ssh(tmp_path / "bin"))


def test_pdsh_serves_over_two_hosts_and_a_signal_ends_all(ssh, models, options, tmp_path):
    hf_dir, key = models / "fp32", tmp_path / "key"
    key.write_text("secret\n")
    options |= {"--api-key-file": str(key)}
    script = str(ROOT / "examples" / "serve_dsv3_pdsh.sh")
    command = ["bash", script, "127.0.0.1,localhost", str(hf_dir), *_words(options)]
    url = f"http://127.0.0.1:{options['--port']}"
    with started(command, env=ssh) as process:
        lines = read_until(process, "curl ", 2 * READY_SECONDS)
        assert is_ready(url), "".join(lines)[-4000:]
        assert len(_servers(hf_dir)) >= 2
        assert "secret" not in "".join([*lines, *_servers(hf_dir)])
        _check_and_follow_curl("".join(lines), url)
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=120)[0]
        assert process.returncode == 0, rest[-3000:]
        assert _servers(hf_dir) == []
        assert not list(Path("/tmp").glob(f"serve-dsv3-*-{process.pid}.*"))


def test_the_pdsh_script_quotes_what_it_hands_to_hosts(ssh, tmp_path):
    """Spaces, quotes and dollars of a path reach the command on the host as they are."""
    program = tmp_path / "show"
    program.write_text('#!/bin/sh\nprintf "[%s]" "$@"\necho\n')
    program.chmod(0o755)
    path = '/models/it\'s "$HOME" & `x`'
    command = ["bash", str(ROOT / "examples" / "serve_dsv3_pdsh.sh"), "a,b", path]
    command += ["--cli", str(program), "--name", "two words"]
    done = run_within(60, command, env=ssh)
    assert done.returncode == 0, done.stderr
    for rank, host in enumerate("ab"):
        [line] = [line for line in done.stdout.splitlines() if line.startswith(f"{host}: ")]
        assert f"[serve][run][{path}][--python][python3][--tp][8][--pp][2][--nodes][2]" in line
        assert (
            f"[--main-address][a][--main-port][29501][--name][two words][--node-rank][{rank}]"
            in line
        )
