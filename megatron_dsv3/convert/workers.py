"""Tasks spread over worker processes, which end with their parent however it ends.

Workers are spawned, not forked: torch's threads do not survive a fork.
"""

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import torch

from megatron_dsv3.convert.memory import keep_freed_memory

TICK_S = 0.2


class Work(Protocol):
    """What a worker does with a task; sent to each worker once."""

    def __call__(self, task: str, *, on_bytes: Callable[[int], None]) -> None:
        """Does it, telling how many bytes have been written."""


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    connection: Connection
    task: str = ""
    """At hand; "" while it waits."""


def run_tasks(
    work: Work, tasks: Sequence[str], *, num_workers: int, on_tick: Callable[[int, list[int]], None]
) -> None:
    """Does all tasks, each worker taking the next one when it is free.

    Args:
        work: Can be pickled.
        tasks: In the order in which they are begun.
        num_workers: Processes.
        on_tick: Called several times a second with all bytes so far and the workers' pids.

    Raises:
        ValueError: The first that a worker raised, or a worker was killed.
    """
    context = get_context("spawn")
    counter = context.Value("q", 0)
    waiting = list(reversed(tasks))
    workers: list[_Worker] = []
    try:
        for _ in range(min(num_workers, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(work, theirs, counter), daemon=True)
            process.start()
            theirs.close()
            workers.append(_Worker(process, ours))
        for worker in workers:
            _give(worker, waiting)
        while busy := [worker for worker in workers if worker.task]:
            for worker in _answering(busy):
                _take(worker)
                _give(worker, waiting)
            on_tick(counter.value, [worker.process.pid or 0 for worker in workers])
    finally:
        for worker in workers:
            worker.process.terminate()
            worker.process.join()
            worker.connection.close()


def _answering(busy: list[_Worker]) -> Iterator[_Worker]:
    ready = wait([worker.connection for worker in busy], timeout=TICK_S)
    yield from (worker for worker in busy if worker.connection in ready)


def _give(worker: _Worker, waiting: list[str]) -> None:
    worker.task = waiting.pop() if waiting else ""
    if worker.task:
        worker.connection.send(worker.task)


def _take(worker: _Worker) -> None:
    """Raises what the worker met, if it met anything."""
    try:
        kind, message = worker.connection.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        raise ValueError(
            f"{worker.task}: its worker ended with code {worker.process.exitcode}, maybe killed "
            f"for lack of memory; start again to go on, with a smaller cap or fewer workers"
        ) from None
    if kind == "problem":
        raise ValueError(message)
    if kind == "bug":
        raise RuntimeError(f"a worker failed at {worker.task}:\n{message}")


def _serve(work: Work, connection: Connection, counter: Any) -> None:
    """Runs inside of a worker until the parent hangs up."""
    # Ctrl-C reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    # torch would start a thread for each core in every worker, which wait for one another at each
    # operation: 90 s instead of 15 with two workers on two cores.
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def count(number: int) -> None:
        with counter.get_lock():
            counter.value += number

    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            work(task, on_bytes=count)
        except (ValueError, OSError) as error:
            connection.send(("problem", str(error)))
        except Exception:
            connection.send(("bug", traceback.format_exc()))
        else:
            connection.send(("done", ""))


def _end_with_parent() -> None:
    """A parent that was killed cannot stop its workers, which would go on to write files."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
