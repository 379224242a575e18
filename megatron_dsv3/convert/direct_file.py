"""A large file, written past the page cache by a thread while what follows is being computed.

Through the page cache every byte is copied once more, into new pages, and the disk waits until a
tenth of the memory is full of them. Where a file system knows no direct writes the cache is used
after all, and synced on the way. Bytes are hashed as they are written: none is read again for that.
"""

import errno
import os
from collections import deque
from collections.abc import Buffer, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path

import xxhash

_BLOCK = 4096
"""Positions, lengths and addresses of direct writes are multiples of it on any disk."""
_BUFFER_BYTES = 8 << 20
_MAX_RUNS = 4
_MAX_BUFFERS = _MAX_RUNS + 2
"""One that is filled for each run, and two on their way to the disk."""
_SYNC_BYTES = 128_000_000


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive bytes of a file."""

    num_bytes: int
    xxh3: str


class _Run:
    """Bytes that came one after the other, the last of them not yet handed on."""

    def __init__(self, start: int, buffer: mmap) -> None:
        self.start = self.end = start
        self.digest = xxhash.xxh3_128()
        self.buffer = buffer
        # The buffer's first byte belongs to a whole block of the file.
        self.base = start - start % _BLOCK
        self.skip = start - self.base


@dataclass(frozen=True, slots=True)
class _Job:
    """A part of a buffer, and where it goes."""

    run: _Run
    buffer: mmap
    base: int
    """Position of the buffer's first byte."""
    first: int
    last: int


class DirectFile:
    """Written at any position; fast where few runs of consecutive bytes take turns."""

    def __init__(self, path: Path, size: int | None = None) -> None:
        """Creates the file or empties it.

        Args:
            path: The file.
            size: Of the finished file, if it is known.
        """
        self._plain = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._direct = _open_direct(path)
        self._runs: list[_Run] = []
        self._ended: list[_Run] = []
        self._free: list[mmap] = []
        self._pending: deque[Future[mmap]] = deque()
        self._num_buffers = self._num_unsynced = 0
        self._pool = ThreadPoolExecutor(1)
        if size is not None:
            os.ftruncate(self._plain, size)

    def write(self, content: Buffer, position: int) -> None:
        """Takes bytes; they are written later.

        Raises:
            OSError: Earlier ones could not be written.
        """
        rest = memoryview(content).cast("B")
        run = self._run_at(position)
        while rest:
            filled = run.end - run.base
            count = min(len(rest), _BUFFER_BYTES - filled)
            run.buffer[filled : filled + count] = rest[:count]
            run.end += count
            rest = rest[count:]
            if filled + count == _BUFFER_BYTES:
                self._hand_on(run)
                run.base, run.skip, run.buffer = run.end, 0, self._take_buffer()

    def finish(self) -> list[Part]:
        """Returns once everything is on the disk: what the file consists of, in its order.

        Raises:
            OSError: Something could not be written.
        """
        while self._runs:
            self._end(self._runs[0])
        while self._pending:
            self._pending.popleft().result()
        os.fsync(self._plain)
        runs = sorted(self._ended, key=lambda run: run.start)
        return [Part(run.end - run.start, run.digest.hexdigest()) for run in runs]

    def close(self) -> None:
        """Lets go of file and thread; what was not finished may be lost."""
        self._pool.shutdown(cancel_futures=True)
        for descriptor in (self._plain, self._direct):
            if descriptor is not None:
                os.close(descriptor)

    def _run_at(self, position: int) -> _Run:
        """The run that goes on there; the one last used is the last of the list."""
        for run in self._runs:
            if run.end == position:
                self._runs.remove(run)
                break
        else:
            if len(self._runs) == _MAX_RUNS:
                self._end(self._runs[0])
            run = _Run(position, self._take_buffer())
        self._runs.append(run)
        return run

    def _end(self, run: _Run) -> None:
        self._runs.remove(run)
        self._ended.append(run)
        self._hand_on(run)

    def _hand_on(self, run: _Run) -> None:
        job = _Job(run, run.buffer, run.base, run.skip, run.end - run.base)
        self._pending.append(self._pool.submit(self._write, job))

    def _take_buffer(self) -> mmap:
        if not self._free and self._num_buffers < _MAX_BUFFERS:
            self._num_buffers += 1
            return mmap(-1, _BUFFER_BYTES)
        while not self._free:
            self._free.append(self._pending.popleft().result())
        return self._free.pop()

    def _write(self, job: _Job) -> mmap:
        """Runs in the thread. Blocks that belong to the run alone are written directly."""
        view = memoryview(job.buffer)
        job.run.digest.update(view[job.first : job.last])
        start = min(-(-job.first // _BLOCK) * _BLOCK, job.last)
        stop = max(job.last // _BLOCK * _BLOCK, start)
        self._write_plain(view[job.first : start], job.base + job.first)
        self._write_direct(view[start:stop], job.base + start)
        self._write_plain(view[stop : job.last], job.base + stop)
        return job.buffer

    def _write_direct(self, content: memoryview, position: int) -> None:
        if self._direct is None:
            self._write_plain(content, position)
            return
        try:
            written = os.pwrite(self._direct, content, position) if content else 0
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Some file systems open a file for direct writes that they then refuse.
            os.close(self._direct)
            self._direct, written = None, 0
        self._write_plain(content[written:], position + written)

    def _write_plain(self, content: memoryview, position: int) -> None:
        while content:
            written = os.pwrite(self._plain, content, position)
            content, position = content[written:], position + written
            self._num_unsynced += written
        if self._num_unsynced >= _SYNC_BYTES:
            os.fdatasync(self._plain)
            self._num_unsynced = 0


def _open_direct(path: Path) -> int | None:
    """None: the system, or the file system, knows no direct writes."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:
        return None


def combined(parts: Sequence[Part]) -> str:
    """The hash of a file: that of its bytes if it is one part, else that of its parts' hashes."""
    if len(parts) == 1:
        return parts[0].xxh3
    return xxhash.xxh3_128_hexdigest("".join([part.xxh3 for part in parts]).encode())
