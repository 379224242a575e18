"""Blocks of items through a pipeline, in several processes, results in order.

Only so many blocks are on their way at once, so memory does not grow with the input. Workers are
started afresh rather than forked, as the tokenizer's threads do not survive a fork; they end when
this process does, however it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from megatron_dsv3.data.pipeline import Block, Pipeline
from megatron_dsv3.data.rows import Item

_BLOCK_BYTES = 1 << 19
_BLOCK_ITEMS = 512
_BLOCKS_PER_WORKER = 3
"""On their way: one being worked on, one waiting, one on its way back."""
_BYTES_PER_WORKER = 1 << 22
"""On their way; with longer rows only one block for each worker, as it lies here twice."""

_pipeline: Pipeline | None = None
"""Of a worker process: sent once, as it holds a vocabulary of 100 MB."""


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def blocks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items by the block: enough to pay for the way to a worker, few enough for memory."""
    block: list[Item] = []
    num_bytes = 0
    for item in items:
        block.append(item)
        num_bytes += item.num_bytes
        if num_bytes >= _BLOCK_BYTES or len(block) >= _BLOCK_ITEMS:
            yield block
            block, num_bytes = [], 0
    if block:
        yield block


def run(pipeline: Pipeline, items: Iterable[Item], *, num_workers: int) -> Iterator[Block]:
    """What comes of all items; with one worker it works in this process.

    Raises:
        ValueError: A worker died.
    """
    if num_workers == 1:
        yield from map(pipeline.run, blocks(items))
        return
    pool = ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(pipeline,),
    )
    waiting: deque[tuple[Future[Block], int]] = deque()
    num_bytes = 0
    try:
        for block in blocks(items):
            while _are_enough(len(waiting), num_bytes, num_workers):
                future, size = waiting.popleft()
                num_bytes -= size
                yield future.result()
            waiting.append((pool.submit(_work, block), _size(block)))
            num_bytes += waiting[-1][1]
        while waiting:
            yield waiting.popleft()[0].result()
    except BrokenProcessPool as error:
        raise ValueError("a worker died; was it out of memory? Try fewer workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _are_enough(num_blocks: int, num_bytes: int, num_workers: int) -> bool:
    """Blocks on their way, so that the next has to wait."""
    long = num_bytes >= num_workers * _BYTES_PER_WORKER
    return num_blocks >= num_workers * (1 if long else _BLOCKS_PER_WORKER)


def _size(block: Iterable[Item]) -> int:
    return sum(item.num_bytes for item in block)


def _start(pipeline: Pipeline) -> None:
    global _pipeline
    _pipeline = pipeline
    # Ctrl-C reaches the whole group of processes; the parent ends it for all.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Each worker is one thread of work; the tokenizer would start as many again in each.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    # The main thread waits for a block that nobody will send.
    os._exit(1)


def _work(block: list[Item]) -> Block:
    assert _pipeline is not None
    return _pipeline.run(block)
