"""A signal that says "save and go": seen by all ranks at the same step boundary."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REQUEUE = 75
"""Exit code: stopped before the end, with a checkpoint to go on from (sysexits' EX_TEMPFAIL)."""
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Requeue(SystemExit):
    """Ends the process so that the scheduler starts it again."""

    def __init__(self) -> None:
        super().__init__(REQUEUE)


class StopRequest:
    """Whether any rank was told to stop.

    A scheduler may signal one rank, some of them, or all at different times. The training step sums
    who was told with its losses: a message of its own after each step would wait for the update.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal that this rank got."""
        self.agreed = False
        """Some rank had been told when the losses of the last step were summed; equal on all."""

    def note(self, number: int, _: FrameType | None) -> None:
        """The handler; nothing else may be done in the middle of a collective."""
        self.received = self.received or signal.Signals(number).name


@contextmanager
def noted(request: StopRequest) -> Iterator[None]:
    """Notes SIGUSR1 and SIGTERM while it is open."""
    before = {number: signal.signal(number, request.note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
