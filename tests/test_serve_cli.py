"""`serve` and `preflight` from the command line: what reaches the commands, and mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dsv3 import cli
from megatron_dsv3.commands import serve
from megatron_dsv3.serve.vllm import Server


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command line in this process: exit code and what went to standard error."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["megatron-dsv3", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


@pytest.fixture
def started(monkeypatch, call):
    """The server that a command line asks for, and the other arguments."""

    def start(*arguments: str) -> tuple[Server, dict]:
        seen = []
        monkeypatch.setattr(serve, "run", lambda server, _, **rest: seen.append((server, rest)))
        code, error = call("serve", "run", *arguments)
        assert code == 0, error
        return seen[0]

    return start


def test_the_defaults_are_those_of_the_record(started, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    server, rest = started("/m/r1")
    assert server == Server(hf_dir=Path("/m/r1"))
    assert rest == {"api_key": None, "checked": True, "smoke": True, "ready_seconds": 7200}


def test_every_option_reaches_the_server_and_unknown_ones_vllm(started):
    server, rest = started(
        *("/m/r1", "--tp", "8", "--pp", "2", "--host", "10.0.0.1", "--port", "1", "--name", "n"),
        *("--max-model-len", "9", "--reasoning-parser", "none", "--tool-parser", "none"),
        *("--speculative", "mtp", "--python", "/v/python", "--nodes", "2", "--node-rank", "1"),
        *("--main-address", "a", "--main-port", "3", "--ready-seconds", "4", "--no-check"),
        *("--no-smoke", "--api-key", "k", "--dtype", "float32", "--enforce-eager"),
    )
    assert server == Server(
        hf_dir=Path("/m/r1"), tp_size=8, pp_size=2, host="10.0.0.1", port=1, name="n",
        max_model_len=9, reasoning_parser=None, tool_parser=None, speculative="mtp",
        python="/v/python", num_nodes=2, node_rank=1, main_address="a", main_port=3,
        extra=("--dtype", "float32", "--enforce-eager"),
    )  # fmt: skip
    assert rest == {"api_key": "k", "checked": False, "smoke": False, "ready_seconds": 4}


def test_the_key_may_come_from_vllms_variable(started, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "from outside")
    assert started("/m/r1")[1]["api_key"] == "from outside"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "check", "/none"], "error: /none: no such directory"),
        (["serve", "run", "/none", "--python", "/none/python"], "cannot be run"),
        (["serve", "run", "/none", "--nodes", "2"], "nodes need --main-address"),
        (["serve", "smoke", "nowhere"], "expected http://HOST:PORT"),
        (["preflight"], "or --local for this machine"),
    ],
)
def test_a_mistake_ends_with_one_line_and_code_2(call, arguments, said):
    code, error = call(*arguments)
    assert code == 2
    assert said in error
    assert error.startswith("error: ")
    assert "Traceback" not in error


def test_serving_imports_nothing_that_the_environment_of_vllm_lacks():
    """Of this package's requirements; docker/Dockerfile.serve installs none of them."""
    lacking = ("megatron.core", "megatron", "xxhash", "matplotlib", "tensorboard", "pyarrow")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({lacking}))\n"
        "import megatron_dsv3.cli, megatron_dsv3.commands.serve"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
