"""The command that starts vLLM, and the life of a server, with a stand-in for vLLM."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fake_vllm import ANSWER, NUM_TOKENS, THOUGHT
from rich.console import Console

from megatron_dsv3.commands import serve
from megatron_dsv3.serve import client, vllm
from megatron_dsv3.serve.client import ask, is_ready
from megatron_dsv3.serve.vllm import Server, check_port, check_python

FAKE = Path(__file__).with_name("fake_vllm.py")
MODEL = Path("/models/my-r1")


@pytest.fixture
def python(tmp_path) -> str:
    """A "Python" whose vLLM is the stand-in."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {FAKE} "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _flags(server: Server) -> dict[str, str]:
    words = server.command()
    return {
        word: following
        for word, following in zip(words, [*words[1:], ""], strict=True)
        if word.startswith("--")
    }


def _alive(pid: int) -> bool:
    """Whether it runs; a zombie, which nobody in a container may collect, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_command_of_a_plain_server_is_as_documented():
    assert Server(hf_dir=MODEL, python="/v/bin/python").command() == shlex.split(
        "/v/bin/python -m vllm.entrypoints.cli.main serve /models/my-r1 --served-model-name my-r1 "
        "--tensor-parallel-size 1 --pipeline-parallel-size 1 --max-model-len 32768 "
        "--reasoning-parser deepseek_r1 --tool-call-parser deepseek_v3 --host 127.0.0.1 "
        "--port 8000 --enable-auto-tool-choice"
    )


def test_parsers_can_be_left_out():
    command = Server(hf_dir=MODEL, reasoning_parser=None, tool_parser=None).command()
    assert not [word for word in command if "parser" in word or "tool" in word or word == "None"]


def test_mtp_is_vllms_own_speculative_config():
    flags = _flags(Server(hf_dir=MODEL, speculative="mtp"))
    assert json.loads(flags["--speculative-config"]) == {
        "method": "mtp",
        "num_speculative_tokens": 1,
    }
    own = '{"method": "ngram"}'
    assert _flags(Server(hf_dir=MODEL, speculative=own))["--speculative-config"] == own
    with pytest.raises(ValueError, match="expected mtp or a JSON object, got 'eagle'"):
        Server(hf_dir=MODEL, speculative="eagle")


def test_the_users_flags_come_last():
    assert Server(hf_dir=MODEL, extra=("--dtype", "float32")).command()[-2:] == [
        "--dtype",
        "float32",
    ]


def test_only_the_first_of_several_nodes_answers():
    first, second = (
        Server(hf_dir=MODEL, tp_size=8, pp_size=2, num_nodes=2, node_rank=rank, main_address="n1")
        for rank in range(2)
    )
    assert _flags(first)["--node-rank"] == "0"
    assert _flags(first)["--host"] == "127.0.0.1"
    assert "--headless" not in first.command()
    assert _flags(second)["--node-rank"] == "1"
    assert _flags(second)["--master-addr"] == "n1"
    assert "--headless" in second.command()
    assert "--host" not in second.command()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_nodes": 2, "tp_size": 2}, "2 nodes need --main-address"),
        ({"num_nodes": 2, "node_rank": 2}, "node rank 2 is not one of 2 nodes"),
        ({"num_nodes": 3, "tp_size": 8}, r"tp\(8\) \* pp\(1\) devices cannot be spread"),
    ],
)
def test_nodes_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Server(hf_dir=MODEL, **options)


def test_an_address_for_all_is_reached_at_this_machine():
    assert Server(hf_dir=MODEL, host="0.0.0.0", port=1).url == "http://127.0.0.1:1"
    assert Server(hf_dir=MODEL, host="10.0.0.1", port=1).url == "http://10.0.0.1:1"
    assert Server(hf_dir=MODEL, host="::", port=1).url == "http://[::1]:1"
    assert Server(hf_dir=MODEL, host="fe80::1", port=1).url == "http://[fe80::1]:1"


def test_no_more_positions_are_served_than_the_model_has(tmp_path):
    def served(**options) -> str:
        return _flags(Server(hf_dir=tmp_path, **options))["--max-model-len"]

    for positions, expected in ((4096, "4096"), (163840, "32768")):
        (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
        assert served() == expected
    assert served(max_model_len=65536) == "65536"


def test_names_are_quoted_in_the_curl_line():
    words = shlex.split(serve.curl("http://h:1", 'my "r1" it\'s', with_key=False))
    assert json.loads(words[-1])["model"] == 'my "r1" it\'s'


def test_a_python_without_vllm_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no vLLM; make an environment"):
        check_python("/bin/false")
    with pytest.raises(ValueError, match=r"cannot be run \(No such file"):
        check_python(str(tmp_path / "none"))


def test_a_taken_port_is_refused(port):
    check_port("127.0.0.1", port)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(ValueError, match=f"127.0.0.1:{port}: cannot listen there"):
            check_port("127.0.0.1", port)


def test_another_servers_answers_are_not_taken_for_ones_own(started, tmp_path):
    url = started()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        with pytest.raises(ValueError, match=f"{url} is not ready after 1 s"):
            vllm.wait_until_ready(other, url, seconds=1)
        other.kill()


# ---- Requests -----------------------------------------------------------------------------------


@pytest.fixture
def started(python, port):
    """Starts the stand-in with further flags and gives its URL."""
    processes = []

    def start(*flags: str, key: str = "") -> str:
        command = Server(hf_dir=MODEL, python=python, port=port, extra=flags).command()
        process = subprocess.Popen(command, env=os.environ | {"VLLM_API_KEY": key})
        processes.append(process)
        vllm.wait_until_ready(process, f"http://127.0.0.1:{port}", seconds=20)
        return f"http://127.0.0.1:{port}"

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_an_answer_comes_with_its_reasoning_and_its_length(started):
    answer = ask(started())
    assert (answer.reasoning, answer.content) == (THOUGHT, ANSWER)
    assert answer.num_tokens == NUM_TOKENS
    assert answer.tokens_per_second == pytest.approx(NUM_TOKENS / answer.seconds)
    assert answer.finish_reason == "stop"


def test_a_url_may_end_in_v1(started):
    assert ask(f"{started()}/v1/").content == ANSWER


def test_a_key_opens_and_its_absence_is_told(started):
    url = started(key="secret")
    assert ask(url, api_key="secret").content == ANSWER
    with pytest.raises(ValueError, match=r"answered 401: .*; give its key with --api-key"):
        ask(url, api_key="wrong")


def test_no_more_is_asked_for_than_the_model_takes(started):
    assert ask(started("--max-model-len", "128"), max_tokens=256).content == ANSWER


def test_an_empty_answer_is_an_error(started):
    with pytest.raises(ValueError, match=r"the answer to 'What is 17 . 24.' is empty"):
        ask(started("--fake-answer", ""))


def test_no_server_is_an_error(port):
    assert not is_ready(f"http://127.0.0.1:{port}")
    with pytest.raises(ValueError, match=r"no answer .*; does the server run there"):
        ask(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "127.0.0.1:8000"])
def test_only_http_is_asked(url):
    with pytest.raises(ValueError, match="expected http://HOST:PORT"):
        ask(url)


# ---- From start to end --------------------------------------------------------------------------


@pytest.fixture
def run(python, port):
    """The command in a process of its own, as signals need one; its output goes to a pipe."""
    processes = []

    def start(*flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "megatron_dsv3.cli", "serve", "run", str(MODEL)]
        command += ["--python", python, "--port", str(port), "--no-check", *flags]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
    # A server that a failed test left behind holds the pipes: reading them would never end.
    for other in psutil.process_iter(["cmdline"]):
        words = other.info["cmdline"] or []
        if str(port) in words and any(word.endswith("fake_vllm.py") for word in words):
            other.kill()
    for process in processes:
        process.communicate(timeout=60)


def _until(process: subprocess.Popen[str], text: str) -> list[str]:
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if text in line:
            return lines
    raise AssertionError(f"ended without {text!r}: {lines} {process.stderr.read()}")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl, whose line is tried")
def test_a_server_is_started_asked_and_ended_with_all_its_children(run, port, tmp_path):
    pids = tmp_path / "pids"
    process = run("--fake-load-seconds", "1", "--fake-pids", str(pids), "--name", "r1")
    lines = _until(process, "curl")
    assert "vllm.entrypoints.cli.main serve /models/my-r1" in lines[0]
    assert lines[1].startswith("ready after ")
    assert lines[2:4] == [f"reasoning: {THOUGHT}", f"answer: {ANSWER}"]
    assert lines[4].startswith(f"{NUM_TOKENS} tokens in ")
    assert subprocess.check_output(["sh", "-c", lines[5].replace("curl", "curl -s")])
    server, child = map(int, pids.read_text().split())
    assert _alive(server)
    assert _alive(child)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert process.stdout.read() == "SIGTERM: ending the server\n"
    assert not _alive(server)
    assert not _alive(child), "an engine that the server left behind would keep the GPUs"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_the_model_loads_ends_cleanly(run, tmp_path, number):
    # Whoever started the tests with nohup has SIGHUP ignored, and children inherit that.
    before = signal.signal(number, signal.SIG_DFL)
    pids = tmp_path / "pids"
    process = run("--fake-load-seconds", "100", "--fake-pids", str(pids))
    signal.signal(number, before)
    _until(process, "vllm.entrypoints")
    while not pids.exists() or not pids.read_text():
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(20) == 0
    assert f"{number.name}: ending the server" in process.stdout.read()
    assert not [pid for pid in map(int, pids.read_text().split()) if _alive(pid)]


def test_a_server_that_ends_before_it_is_ready_is_told(run):
    process = run("--fake-load-seconds", "0.2", "--fake-exit", "3")
    assert process.wait(20) == 2
    assert "vLLM ended with exit code 3 before it was ready" in process.stderr.read()


def test_a_server_that_is_never_ready_is_given_up_and_ended(run, tmp_path):
    pids = tmp_path / "pids"
    flags = ("--fake-load-seconds", "100", "--fake-pids", str(pids), "--ready-seconds", "2")
    process = run(*flags)
    assert process.wait(30) == 2
    assert "is not ready after 2 s" in process.stderr.read()
    assert not [pid for pid in map(int, pids.read_text().split()) if _alive(pid)]


def test_a_terminal_that_closes_does_not_end_what_nohup_keeps(python, port, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        command = Server(hf_dir=MODEL, python=python, port=port).command()
        with vllm.running(command, api_key=None) as process:
            os.kill(os.getpid(), signal.SIGHUP)
            vllm.wait_until_ready(process, f"http://127.0.0.1:{port}", seconds=20)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_deaf_server_is_killed(python, port, monkeypatch):
    monkeypatch.setattr(vllm, "_GRACE_SECONDS", 0.5)
    command = Server(hf_dir=MODEL, python=python, port=port, extra=("--fake-deaf",)).command()
    with vllm.running(command, api_key=None) as process:
        vllm.wait_until_ready(process, f"http://127.0.0.1:{port}", seconds=20)
    assert process.returncode == -signal.SIGKILL


def test_the_key_is_not_on_the_command_line(python, port, monkeypatch):
    seen = {}
    monkeypatch.setattr(client, "QUESTION", "?")

    def wait(process, url, *, seconds):
        # Both are empty for a moment after exec has taken the new program.
        until = time.monotonic() + 60
        while len(seen) < 2 and time.monotonic() < until:
            for name in ("cmdline", "environ"):
                if text := Path(f"/proc/{process.pid}/{name}").read_text():
                    seen[name] = text
        raise ValueError("enough")

    monkeypatch.setattr(vllm, "wait_until_ready", wait)
    server = Server(hf_dir=MODEL, python=python, port=port)
    with pytest.raises(ValueError, match="enough"):
        serve.run(server, Console(), api_key="secret", checked=False)
    assert "secret" not in seen["cmdline"]
    assert "VLLM_API_KEY=secret" in seen["environ"]


def test_a_server_open_to_others_without_a_key_is_noted(python, port, capsys):
    server = Server(
        hf_dir=MODEL, python=python, port=port, host="0.0.0.0", extra=("--fake-exit=0",)
    )
    with pytest.raises(ValueError, match="ended with exit code 0"):
        serve.run(server, Console(), checked=False)
    assert "note: whoever reaches 0.0.0.0 can use it" in capsys.readouterr().out


def test_a_node_that_only_computes_asks_nothing(python, capsys):
    server = Server(
        hf_dir=MODEL, python=python, tp_size=2, num_nodes=2, node_rank=1, main_address="n1",
        extra=("--fake-exit", "0"),
    )  # fmt: skip
    serve.run(server, Console())
    assert "ready" not in capsys.readouterr().out
