"""Runs the command line in children of a server that has imported everything: quick to start."""

import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HEAVY = ["megatron_dsv3.commands.train", "megatron_dsv3.cli", "cli_children"]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(HEAVY)


def start(arguments: Sequence[str], log: Path, *, slow_writes_s: float = 0.0):
    """The process; it writes all that it says to `log`."""
    process = _context.Process(target=_run, args=(list(arguments), str(log), slow_writes_s))
    process.start()
    return process


def run(arguments: Sequence[str], log: Path, *, timeout_s: float = 120) -> int:
    """Exit code."""
    process = start(arguments, log)
    process.join(timeout_s)
    assert process.exitcode is not None, f"still running after {timeout_s} s: {log.read_text()}"
    return process.exitcode


def wait_for(text: str, log: Path, process, *, timeout_s: float = 120) -> None:
    """Until the process has said it."""
    end = time.monotonic() + timeout_s
    while not log.exists() or text not in log.read_text():
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.005)


def _run(arguments: list[str], log: str, slow_writes_s: float) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - for the whole process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    if slow_writes_s:
        _slow_down(slow_writes_s)
    from megatron_dsv3 import cli

    sys.argv = ["megatron-dsv3", *arguments]
    cli.main()


def _slow_down(seconds: float) -> None:
    """A slow disk: each file of a checkpoint takes this long, after its first bytes."""
    from megatron_dsv3.checkpoint import writer

    original = writer.FileSystemWriterAsync.write_preloaded_data

    def slow(transforms, number, bucket, *rest, **options):
        path = Path(bucket[0])
        path.write_bytes(b"the first bytes")
        time.sleep(seconds)
        return original(transforms, number, bucket, *rest, **options)

    writer.FileSystemWriterAsync.write_preloaded_data = staticmethod(slow)
