"""vLLM's command line for a DeepSeek-V3, and a server of it from start to end.

vLLM lives in an environment of its own, whose Python is an option: nothing of it is imported here.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import psutil

from megatron_dsv3.config.hf_config import read_config_json
from megatron_dsv3.serve.client import is_ready

API_KEY_VARIABLE = "VLLM_API_KEY"
"""Where vLLM looks for its key; on its command line every user of the machine could read it."""
LONGEST = 32768
"""Tokens of a prompt and its answer that are served unless more is asked for."""
MTP: Mapping[str, Any] = {"method": "mtp", "num_speculative_tokens": 1}
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""By them a user, a scheduler or a terminal that closes ends a program. The server is in a group of
its own and would go on."""
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 30.0
"""What a server gets to end on its own before it is killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What is served and how; the defaults open nothing to other machines."""

    hf_dir: Path
    python: str = sys.executable
    """Of the environment where vLLM is installed."""
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    """What requests call the model; None: the directory's name."""
    tp_size: int = 1
    pp_size: int = 1
    max_model_len: int | None = None
    """Tokens of a prompt and its answer together; None: 32768, or what a shorter model takes."""
    reasoning_parser: str | None = "deepseek_r1"
    tool_parser: str | None = "deepseek_v3"
    speculative: str | None = None
    """`mtp`, or vLLM's own JSON."""
    num_nodes: int = 1
    node_rank: int = 0
    """The first node answers requests; the others only compute."""
    main_address: str | None = None
    """Address of the first node, for the others."""
    main_port: int = 29501
    extra: tuple[str, ...] = ()
    """Flags that go to vLLM as they are, after all others, so that they win."""

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ValueError("; ".join(problems))

    def _problems(self) -> Iterator[str]:
        if not 0 <= self.node_rank < self.num_nodes:
            yield f"node rank {self.node_rank} is not one of {self.num_nodes} nodes (from 0)"
        if self.num_nodes > 1 and not self.main_address:
            yield f"{self.num_nodes} nodes need --main-address, that of the first node"
        if self.tp_size * self.pp_size % self.num_nodes:
            yield (
                f"tp({self.tp_size}) * pp({self.pp_size}) devices cannot be spread evenly over "
                f"{self.num_nodes} nodes"
            )
        if self.speculative not in (None, "mtp") and not _is_object(self.speculative):
            yield f"speculative: expected mtp or a JSON object, got {self.speculative!r}"

    @property
    def answers(self) -> bool:
        """Whether requests go to this node."""
        return self.node_rank == 0

    @property
    def served_name(self) -> str:
        """What requests call the model."""
        return self.name or self.hf_dir.resolve().name

    @property
    def url(self) -> str:
        """Where this machine reaches the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def _longest_of_model(self) -> int:
        """vLLM refuses to serve more positions than config.json names."""
        if not (self.hf_dir / "config.json").is_file():
            return LONGEST
        positions = read_config_json(self.hf_dir).get("max_position_embeddings")
        return positions if type(positions) is int and positions > 0 else LONGEST

    def command(self) -> list[str]:
        """The command that starts the server."""
        # Not `vllm`: the script of an environment that was moved points to its old place.
        program = [self.python, "-m", "vllm.entrypoints.cli.main", "serve", str(self.hf_dir)]
        flags: dict[str, Any] = {
            "served-model-name": self.served_name,
            "tensor-parallel-size": self.tp_size,
            "pipeline-parallel-size": self.pp_size,
            "max-model-len": self.max_model_len or min(LONGEST, self._longest_of_model()),
            "reasoning-parser": self.reasoning_parser,
            "tool-call-parser": self.tool_parser,
            "speculative-config": json.dumps(MTP)
            if self.speculative == "mtp"
            else self.speculative,
        }
        if self.answers:
            flags |= {"host": self.host, "port": self.port}
        if self.num_nodes > 1:
            flags |= {"nnodes": self.num_nodes, "node-rank": self.node_rank}
            flags |= {"master-addr": self.main_address, "master-port": self.main_port}
        switches = ["--enable-auto-tool-choice"] if self.tool_parser else []
        switches += [] if self.answers else ["--headless"]
        given = [
            text
            for key, value in flags.items()
            if value is not None
            for text in (f"--{key}", str(value))
        ]
        return [*program, *given, *switches, *self.extra]


def _is_object(text: str | None) -> bool:
    try:
        return isinstance(json.loads(text or ""), dict)
    except json.JSONDecodeError:
        return False


def check_python(python: str) -> None:
    """Raises ValueError unless this Python exists and has vLLM."""
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    way_out = (
        "make an environment (python -m venv VLLM && VLLM/bin/pip install vllm) and give its "
        "Python with --python VLLM/bin/python"
    )
    try:
        done = subprocess.run([python, "-c", probe], check=False, timeout=60, capture_output=True)
    except OSError as error:
        raise ValueError(f"{python}: cannot be run ({error.strerror}); {way_out}") from None
    if done.returncode:
        raise ValueError(f"{python}: has no vLLM; {way_out}")


def check_port(host: str, port: int) -> None:
    """Raises ValueError where the server could not listen: another's answers would be taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As servers do; without, connections that ended a minute ago would count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"{host}:{port}: cannot listen there ({error.strerror})") from None


class SignalError(Exception):
    """A signal asked this process to end; its name."""


@contextmanager
def running(command: Sequence[str], *, api_key: str | None) -> Iterator[subprocess.Popen[bytes]]:
    """A server's process, in a group of its own, which is gone when the block is left.

    Inside the block the signals that ask a process to end raise `SignalError`; one that was ignored
    before (SIGHUP under nohup) stays ignored.

    Args:
        command: Program and arguments.
        api_key: What requests must carry; it goes by the environment, which others cannot read.
    """
    environment = os.environ | ({API_KEY_VARIABLE: api_key} if api_key else {})
    process = None
    handlers = {
        number: signal.signal(number, _raise)
        for number in _ENDING
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        process = subprocess.Popen(list(command), env=environment, start_new_session=True)
        yield process
    finally:
        for number in handlers:  # a second signal must not cut the clean-up short
            signal.signal(number, signal.SIG_IGN)
        if process is not None:
            _end_group(process)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    raise SignalError(signal.Signals(number).name)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, time to end, SIGKILL to whatever of the group is left."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], url: str, *, seconds: float) -> float:
    """Asks until the server answers; gives the seconds that took.

    Args:
        process: The server's.
        url: Where it will answer.
        seconds: When to give up; 671B from a slow disk takes half an hour.

    Raises:
        ValueError: The process ended, or time ran out.
    """
    start = time.monotonic()
    while (passed := time.monotonic() - start) < seconds:
        if (code := process.poll()) is not None:
            raise ValueError(
                f"vLLM ended with exit code {code} before it was ready; the reason is in its "
                "output above"
            )
        if is_ready(url) and _listens(process.pid, urlsplit(url).port):
            return passed
        time.sleep(_POLL_SECONDS)
    raise ValueError(f"{url} is not ready after {seconds:g} s; --ready-seconds gives it more")


def _listens(pid: int, port: int | None) -> bool:
    """Whether the process or a child of it listens there.

    Another server's answers would be taken else: vLLM binds its port long before it listens, and as
    long as nobody listens the system lets two bind one.
    """
    try:
        server = psutil.Process(pid)
        processes = [server, *server.children(recursive=True)]
        connections = [each for one in processes for each in one.net_connections("tcp")]
    except psutil.NoSuchProcess:  # ended just now; it is asked again
        return False
    return any(each.status == psutil.CONN_LISTEN and each.laddr[1] == port for each in connections)
