"""Saves during a run: at most one under way, old ones dropped, errors met as the job says."""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from megatron_dsv3.checkpoint.directory import checkpoints, name_of, retain
from megatron_dsv3.checkpoint.store import Trainee, request_save
from megatron_dsv3.checkpoint.writer import SaveError, raise_save_error
from megatron_dsv3.config.sections import CheckpointSection


class Saver:
    """Every method is collective: all ranks call the same ones in the same order."""

    def __init__(
        self,
        trainee: Trainee,
        folder: Path,
        section: CheckpointSection,
        tell: Callable[[str], None],
    ) -> None:
        """Starts nothing.

        Args:
            trainee: What is saved.
            folder: Where to; made by the first save.
            section: Of the job.
            tell: Takes a line for the user; called on rank 0 only.
        """
        self.trainee, self.folder, self.section, self.tell = trainee, folder, section, tell
        self.last_saved: int | None = None
        """Step of the newest checkpoint that this run has finished."""
        self._queue = AsyncCallsQueue()
        self._under_way: tuple[int, float, float] | None = None
        """Step, time of the start, seconds for which training stood still."""
        self._retention: threading.Thread | None = None
        self._device = _device_of(folder) if any(checkpoints(folder)) else None
        """Number of the file system, once it is known to be the right one."""

    def save(self, step: int, own: Mapping[str, Any], *, wait: bool = False) -> None:
        """Saves the state after a step; returns once the copy is safe, or with `wait` the files.

        A save that is still under way is waited for first.

        Raises:
            SaveError: On every rank, where the job says that a failed save ends the run.
        """
        self._finalize(wait=True)
        began = time.monotonic()
        try:
            self._check_mount(step)
            request = request_save(self.trainee, self.folder, step=step, own=own)
            if self.section.asynchronous:
                self._queue.schedule_async_request(request)
            else:
                request.execute_sync()
        except SaveError as error:
            self._failed(error)
            return
        self._under_way = step, began, time.monotonic() - began
        if self.section.asynchronous:
            self._finalize(wait=wait)
        else:
            self._saved()

    def poll(self) -> None:
        """Completes a save whose files are written; call once a step. Raises as `save` does."""
        self._finalize(wait=False)

    def finish(self) -> None:
        """Waits for all that is under way. Raises as `save` does."""
        self._finalize(wait=True)
        if self._retention is not None:
            self._retention.join()

    def _finalize(self, *, wait: bool) -> None:
        try:
            if self._queue.maybe_finalize_async_calls(blocking=wait):
                self._saved()
        except SaveError as error:
            self._failed(error)

    def _saved(self) -> None:
        assert self._under_way is not None
        step, began, still = self._under_way
        self._under_way, self.last_saved = None, step
        self._device = _device_of(self.folder)
        if self.trainee.groups.rank == 0:
            self.tell(
                f"saved {self.folder / name_of(step)} in {time.monotonic() - began:.1f} s; "
                f"training stood still for {still:.1f} s"
            )
            self._start_retention()

    def _check_mount(self, step: int) -> None:
        """Where a mount is gone, its mount point is an ordinary folder of the local disk."""
        now = _device_of(self.folder)
        problem = ""
        if self._device is not None and now != self._device:
            problem = f"{self.folder} is not on the file system it was on; is the mount gone?"
        raise_save_error(problem, step)

    def _failed(self, error: SaveError) -> None:
        self._under_way = None
        if self.section.on_save_error == "stop":
            raise error
        if self.trainee.groups.rank == 0:
            kept = "no checkpoint yet" if self.last_saved is None else name_of(self.last_saved)
            self.tell(f"NOT SAVED, going on: {error}; newest of this run: {kept}")

    def _start_retention(self) -> None:
        """In a thread: deleting terabytes takes minutes on some file systems."""
        if self._retention is not None:
            self._retention.join()
        self._retention = threading.Thread(target=self._retain, name="checkpoint-retention")
        self._retention.start()

    def _retain(self) -> None:
        try:
            for line in retain(
                self.folder,
                keep_last=self.section.keep_last,
                keep_weights_every=self.section.keep_weights_every,
            ):
                self.tell(line)
        except (OSError, ValueError) as error:
            self.tell(f"old checkpoints stay in {self.folder}: {error}")


def _device_of(folder: Path) -> int | None:
    try:
        return folder.stat().st_dev
    except OSError:
        return None
