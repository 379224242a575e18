"""`megatron-dsv3 serve`: is a directory servable, a server of it, a request to one that runs."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.serve import vllm
from megatron_dsv3.serve.client import Answer, ask
from megatron_dsv3.serve.hf_check import Finding, refuse_unservable

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check(directory: Path, console: Console) -> None:
    """Shows what whoever serves the directory should know.

    Raises:
        ValueError: vLLM cannot serve it; everything in the way is listed.
    """
    findings = refuse_unservable(directory)
    show(findings, console)
    _say(console, f"{directory}: servable")


def run(
    server: vllm.Server,
    console: Console,
    *,
    api_key: str | None = None,
    checked: bool = True,
    smoke: bool = True,
    ready_seconds: float = 7200,
) -> None:
    """Checks, starts vLLM, waits until it answers, asks one question, and stays until it ends.

    SIGTERM or Ctrl-C end the server and return.

    Args:
        server: What to serve and how.
        console: For the command, what is found, and the answer.
        api_key: What requests must carry.
        checked: Whether the directory is checked first.
        smoke: Whether a question is asked.
        ready_seconds: When to give up waiting.

    Raises:
        ValueError: It cannot be served, or vLLM ended by itself.
    """
    vllm.check_python(server.python)
    if server.answers:
        vllm.check_port(server.host, server.port)
        if checked:
            show(refuse_unservable(server.hf_dir), console)
        if server.speculative == "mtp" and not Architecture.from_hf(server.hf_dir).num_mtp_layers:
            raise ValueError(f"{server.hf_dir}: has no MTP layer; leave --speculative out")
        if server.host not in LOOPBACK and not api_key:
            _say(console, f"note: whoever reaches {server.host} can use it; --api-key asks for one")
    command = server.command()
    _say(console, shlex.join(command))
    with vllm.running(command, api_key=api_key) as process:
        try:
            if server.answers:
                seconds = vllm.wait_until_ready(process, server.url, seconds=ready_seconds)
                _say(console, f"ready after {seconds:.0f} s at {server.url}")
                if smoke:
                    show_answer(ask(server.url, api_key=api_key), console)
                _say(console, curl(server.url, server.served_name, with_key=bool(api_key)))
            code = process.wait()
        except vllm.SignalError as signal:
            _say(console, f"{signal}: ending the server")
            return
    if code:
        raise ValueError(f"vLLM ended with exit code {code}; the reason is in its output above")


def smoke(
    url: str, console: Console, *, question: str, max_tokens: int, api_key: str | None
) -> None:
    """Asks a server that runs one question and shows what comes back."""
    show_answer(ask(url, question=question, max_tokens=max_tokens, api_key=api_key), console)


def curl(url: str, name: str, *, with_key: bool) -> str:
    """A line for a shell that asks the same server."""
    key = f'-H "Authorization: Bearer ${vllm.API_KEY_VARIABLE}" ' if with_key else ""
    content = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}]})
    return (
        f"curl {key}-H 'Content-Type: application/json' {url}/v1/chat/completions "
        f"-d {shlex.quote(content)}"
    )


def show_answer(answer: Answer, console: Console) -> None:
    """Reasoning, answer and speed."""
    _say(console, f"reasoning: {answer.reasoning}")
    _say(console, f"answer: {answer.content}")
    _say(
        console,
        f"{answer.num_tokens} tokens in {answer.seconds:.1f} s, "
        f"{answer.tokens_per_second:.1f} tokens/s, ended by {answer.finish_reason}",
    )


def show(findings: Sequence[Finding], console: Console) -> None:
    """A line for each finding."""
    for finding in findings:
        _say(console, f"note: {finding}")


def _say(console: Console, line: str) -> None:
    """One line that can be copied: neither wrapped nor coloured, brackets as they are."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)
