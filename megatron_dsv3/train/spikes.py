"""What to do with a step whose loss is not finite, or far above those before it."""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from megatron_dsv3.config.sections import SpikesSection
from megatron_dsv3.model.groups import SharedError


class NonFiniteError(SharedError):
    """Loss or gradient is NaN or infinite; nothing was updated."""


class SpikeError(SharedError):
    """The loss is far above those before it; nothing was updated."""


class SpikeGuard:
    """Watches the loss of every step. It is equal on every rank, so all of them decide alike."""

    def __init__(self, section: SpikesSection) -> None:
        self.section = section
        self.recent: deque[float] = deque(maxlen=section.window)
        self.num_skipped = 0
        """Steps left out so far."""
        self._in_a_row = 0

    def state(self) -> dict[str, Any]:
        """Plain values that `restore` takes."""
        return {
            "recent": list(self.recent),
            "num_skipped": self.num_skipped,
            "in_a_row": self._in_a_row,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`; a smaller window keeps the newest losses."""
        self.recent.extend(state["recent"])
        self.num_skipped, self._in_a_row = state["num_skipped"], state["in_a_row"]

    def explain(self, loss: float) -> str | None:
        """Why this loss is a spike; None: it is none."""
        if not math.isfinite(loss):
            return f"loss is {loss}"
        factor = self.section.factor
        if factor is None or len(self.recent) < self.section.window:
            return None
        median = statistics.median(self.recent)
        if loss <= factor * median:
            return None
        return f"loss {loss:.4f} is more than {factor} times the median {median:.4f}"

    def keep(self, loss: float) -> None:
        """Takes in the loss of a step that was done."""
        self.recent.append(loss)
        self._in_a_row = 0

    def skip(self, reason: SharedError) -> None:
        """Counts a step as left out.

        Raises:
            SharedError: `reason`, where the job says stop or too many steps in a row were left out.
        """
        if self.section.action == "stop":
            raise reason
        self.num_skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= self.section.max_skipped:
            raise type(reason)(
                f"{reason}; {self._in_a_row} steps in a row were skipped (spikes.max_skipped); "
                f"lower optimizer.lr or look at the samples"
            )
