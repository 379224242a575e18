"""How much memory a conversion takes, and how large its pieces may be so that it stays under a cap.

Counted is what the system cannot take back: anonymous and shared pages that are resident (RssAnon +
RssShmem of /proc/PID/status), summed over all processes of the conversion on this machine. A page
that two processes share is counted twice. Pages of mapped files and of the page cache are not
counted.
"""

import ctypes
import os
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

_COUNTED = re.compile(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", re.MULTILINE)
_PARENT_BYTES = 1_200_000_000
"""Python, torch, and the index of a training run of the 671B, while it is read; with a worker's
share, which nobody else takes then, it is enough for the process that lays the model out, too."""
_WORKER_BYTES = 480_000_000
"""Python, torch, and what a worker knows about 46,183 tensors and where they are."""
_COPIES = 4
"""Pieces that a worker holds at once: read, computed, and two in the buffers of both."""
PIECE_BYTES = 32_000_000
"""Largest part of a tensor that a worker holds. An expert's matrix fits; larger gains nothing."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h: free bytes at the heap's end, and size of a block, that go back to the system."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A cap and what follows from it."""

    max_bytes: int
    num_workers: int

    def __post_init__(self) -> None:
        """Raises ValueError if the workers could not work under this cap."""
        if self.num_workers < 1:
            raise ValueError(f"workers: expected at least 1, got {self.num_workers}")
        least = self.needed_bytes
        if self.max_bytes < least:
            raise ValueError(
                f"max memory of {self.max_bytes:,} bytes is too little for {self.num_workers} "
                f"workers, which need {least:,}; allow more or take fewer workers"
            )

    @property
    def needed_bytes(self) -> int:
        """What all processes together take at most, whatever the size of the model."""
        pieces = _COPIES * PIECE_BYTES * self.num_workers
        return _PARENT_BYTES + _WORKER_BYTES * self.num_workers + pieces

    @property
    def piece_bytes(self) -> int:
        """Largest part of a tensor that a worker may hold."""
        return PIECE_BYTES


def resident_bytes(pids: Iterable[int]) -> int:
    """Memory of these processes as defined above; one that has ended counts nothing."""
    total = 0
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
        except OSError:
            continue
        total += sum(1024 * int(kilobytes) for kilobytes in _COUNTED.findall(status))
    return total


class PeakMeter:
    """The most that this process and all that it has started took at once, as defined above."""

    TICK_S = 0.2

    def __init__(self) -> None:
        """Measures nothing before the `with` block begins."""
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._measure, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _measure(self) -> None:
        this = psutil.Process()
        while not self._stop.wait(self.TICK_S):
            children = [process.pid for process in this.children(recursive=True)]
            self.peak_bytes = max(self.peak_bytes, resident_bytes([os.getpid(), *children]))


def keep_freed_memory() -> None:
    """Makes this process reuse what it frees instead of giving it back to the system at once.

    Each piece of a tensor would otherwise live in new pages, and their page faults take longer than
    converting the numbers in them. A C library without this setting is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2 * PIECE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _COPIES * PIECE_BYTES)
