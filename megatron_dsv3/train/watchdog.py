"""Ends a process that makes no progress, after writing down the stacks of all its threads.

A rank that hangs makes all others wait in their next collective, so the watchdogs of all go off,
and every rank's stack is written: the odd one out is the culprit. A process that ends takes its
peers along at once where they talk over sockets, so each waits a while after writing. Both timers
need neither the interpreter's lock nor a main thread that runs: faulthandler's writes, and the
system's alarm, which no handler answers, ends the process.
"""

import faulthandler
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

STACKS = "stacks"
"""Directory, in that of the logs; a file a rank."""


class Watchdog:
    """Must be told of progress in less than its time."""

    def __init__(self, file: TextIO, timeout_s: float | None) -> None:
        self.file, self.timeout_s = file, timeout_s
        self.grace_s = 0.0 if timeout_s is None else timeout_s / 4
        """Seconds between writing and ending: others may have been at work a little longer."""

    def progress(self) -> None:
        """Begins to wait anew."""
        if self.timeout_s is not None:
            faulthandler.dump_traceback_later(self.timeout_s, file=self.file)
            signal.setitimer(signal.ITIMER_REAL, self.timeout_s + self.grace_s)

    def pause(self) -> None:
        """Waits for nothing, until the next progress."""
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def watchdog(log_dir: Path, rank: int, timeout_s: float | None) -> Iterator[Watchdog]:
    """Watches while it is open; after a hang the process ends by SIGALRM.

    Crashes of the process (a signal, NCCL's own abort) leave their stacks in the same file, which
    is removed where nothing was written.

    Args:
        log_dir: Gets `stacks/rank_00000.txt`.
        rank: Of this process.
        timeout_s: Seconds without progress that are too many; None: never.
    """
    path = log_dir / STACKS / f"rank_{rank:05}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    was_enabled = faulthandler.is_enabled()
    # Appended to: a run that is started again must not erase why.
    with path.open("a", encoding="utf-8") as file:
        faulthandler.enable(file)
        before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
        dog = Watchdog(file, timeout_s)
        dog.progress()
        try:
            yield dog
        finally:
            dog.pause()
            signal.signal(signal.SIGALRM, before)
            faulthandler.disable()
            if was_enabled and sys.__stderr__:  # sys.stderr may be replaced by what has no file
                faulthandler.enable(sys.__stderr__)
    if path.stat().st_size == 0:
        path.unlink()
        with suppress(OSError):  # other ranks' files are still there
            path.parent.rmdir()
