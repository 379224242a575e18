"""A large file reaches the disk while it is still being written, so that its end waits for little.

The system itself begins to write at a tenth of the memory full of changed pages. A file below that
would be computed first and stored after that, with the disk and the processor idle in turn.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

_SYNC_BYTES = 128_000_000


class WriteBehind:
    """Syncs a file from a thread, again and again."""

    def __init__(self, file: BinaryIO) -> None:
        """Starts nothing before the first `_SYNC_BYTES` are written."""
        self._file = file
        self._pool = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None
        self._num_new = 0

    def wrote(self, num_bytes: int) -> None:
        """To be told of every write.

        Raises:
            OSError: An earlier one did not reach the disk.
        """
        self._num_new += num_bytes
        if self._num_new < _SYNC_BYTES or not (self._running is None or self._running.done()):
            return
        self._wait()
        self._num_new = 0
        # It holds no lock of Python's while it waits for the disk.
        self._running = self._pool.submit(os.fdatasync, self._file.fileno())

    def finish(self) -> None:
        """Returns once everything is on the disk."""
        self._wait()
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Lets go of the thread; call before the file is closed."""
        self._pool.shutdown()

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()
