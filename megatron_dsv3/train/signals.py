"""A signal that says "save and go": seen by all ranks at the same step boundary."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

REQUEUE = 75
"""Exit code: stopped before the end, with a checkpoint to go on from (sysexits' EX_TEMPFAIL)."""
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Requeue(SystemExit):
    """Ends the process so that the scheduler starts it again."""

    def __init__(self) -> None:
        super().__init__(REQUEUE)


class StopRequest:
    """Whether any rank was told to stop."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.received: str | None = None
        """Name of the first signal that this rank got."""

    def agreed(self) -> bool:
        """Collective: a scheduler may signal one rank, some of them, or all at different times."""
        flag = torch.tensor([int(self.received is not None)], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def note(self, number: int, _: FrameType | None) -> None:
        """The handler; nothing else may be done in the middle of a collective."""
        self.received = self.received or signal.Signals(number).name


@contextmanager
def stop_request(device: torch.device) -> Iterator[StopRequest]:
    """Notes SIGUSR1 and SIGTERM while it is open."""
    request = StopRequest(device)
    before = {number: signal.signal(number, request.note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
