"""A conversion on one machine or many: files written by workers under a memory cap, resumable.

A `Direction` says which files the target has and how one of them is written in pieces; what is here
is the same for all directions. Nodes share the target's file system and do not talk to each other:
each writes its share of the files, and the one that finds all of them finished writes the rest.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_dsv3.convert.journal import Entry, Journal, Report, Written
from megatron_dsv3.convert.memory import Budget, resident_bytes
from megatron_dsv3.convert.workers import run_tasks

Seal = Callable[[Path, Mapping[str, Entry]], None]
"""Takes the folder and, of each unit in it, size and hash."""
_SPARE_BYTES = 100_000_000
"""For indices, tokenizer and journal."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One file of the target."""

    name: str
    num_bytes: int
    """Of the file, exactly or a little more."""


class Direction(Protocol):
    """What is converted into what. Sent to every worker once; opens its files where it works."""

    def options(self) -> Mapping[str, Any]:
        """All that the result's bytes depend on, as JSON; to go on takes the same ones."""

    def units(self) -> Sequence[Unit]:
        """The large files of the target, always the same ones in the same order."""

    def write(
        self, unit: str, path: Path, *, piece_bytes: int, on_bytes: Callable[[int], None]
    ) -> Written:
        """Writes and syncs one file, the same bytes in the same parts each time.

        Args:
            unit: Name of a unit.
            path: Where to write; not yet under its final name.
            piece_bytes: Most that may be held of a tensor, in the wider of the two types.
            on_bytes: To be told how many bytes have been written, as often as pieces are.
        """

    def finish(self, folder: Path, reports: Mapping[str, Report]) -> None:
        """Writes what the target has besides its units, which all are in `folder`."""


@dataclass(frozen=True, slots=True)
class Share:
    """Which node of how many this is."""

    rank: int = 0
    num_nodes: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for a node that is not one of them."""
        if not 0 <= self.rank < self.num_nodes:
            raise ValueError(f"node rank {self.rank} is not one of {self.num_nodes} nodes")

    def of(self, units: Sequence[Unit]) -> list[Unit]:
        """This node's units: the largest first, each to the node that has least to do."""
        loads = [0] * self.num_nodes
        mine = []
        for unit in sorted(units, key=lambda unit: (-unit.num_bytes, unit.name)):
            node = loads.index(min(loads))
            loads[node] += unit.num_bytes
            if node == self.rank:
                mine.append(unit)
        return mine


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a node is."""

    done_bytes: int
    total_bytes: int
    memory_bytes: int
    """As in `memory.resident_bytes`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a node's part of a conversion came to."""

    written_bytes: int
    seconds: float
    peak_memory_bytes: int
    is_finished: bool
    """Whether the target is complete; False: other nodes are still at work."""
    reports: Mapping[str, Report]
    """Of every unit, if finished."""


@dataclass(frozen=True, slots=True)
class _UnitWork:
    """What a worker does: a file that is finished is checked, any other is written."""

    direction: Direction
    journal: Journal
    piece_bytes: int

    def __call__(self, task: str, *, on_bytes: Callable[[int], None]) -> None:
        if self._is_whole(task, on_bytes):
            return
        final = self.journal.staging / task
        path = self.journal.draft(task)
        try:
            written = self.direction.write(
                task, path, piece_bytes=self.piece_bytes, on_bytes=on_bytes
            )
            entry = Entry.of(written)
            assert _has_size(path, entry.size)
            path.replace(final)
        finally:
            path.unlink(missing_ok=True)
        self.journal.record(task, entry)

    def _is_whole(self, task: str, on_bytes: Callable[[int], None]) -> bool:
        counted = 0

        def count(number: int) -> None:
            nonlocal counted
            counted += number
            on_bytes(number)

        whole = self.journal.is_whole(task, on_bytes=count)
        if not whole:
            on_bytes(-counted)
        return whole


def convert(
    direction: Direction,
    out: Path,
    *,
    budget: Budget,
    share: Share = Share(),
    on_progress: Callable[[Progress], None] = lambda _: None,
    seal: Seal = lambda folder, entries: None,
) -> Outcome:
    """Converts this node's share, and completes the target if no other share is missing.

    Killed and called again it goes on from the finished files.

    Args:
        direction: What is converted.
        out: The target.
        budget: What this machine's processes may take.
        share: Which node this is.
        on_progress: Called several times a second.
        seal: Called when all is written, before the target has its name.

    Raises:
        ValueError: The target is another's, the disk is too small, or a file cannot be written or
            read; nothing then stands under the target's name.
    """
    began = time.monotonic()
    units = direction.units()
    journal = Journal(out, direction.options())
    journal.remove_drafts()
    _check_space(journal, units)
    mine = share.of(units)
    total = sum(unit.num_bytes for unit in mine)
    done = peak = 0

    def tick(num_bytes: int, pids: list[int]) -> None:
        nonlocal done, peak
        memory = resident_bytes([os.getpid(), *pids])
        done, peak = num_bytes, max(peak, memory)
        on_progress(Progress(num_bytes, total, memory))

    work = _UnitWork(direction, journal, budget.piece_bytes)
    run_tasks(work, [unit.name for unit in mine], num_workers=budget.num_workers, on_tick=tick)
    # Alone there is nobody else who could be at it, only an earlier run that was killed.
    reports = _complete(direction, journal, seal, force=share.num_nodes == 1)
    finished = reports is not None
    return Outcome(done, time.monotonic() - began, peak, finished, reports or {})


def finalize(
    direction: Direction, out: Path, *, seal: Seal = lambda folder, entries: None
) -> Mapping[str, Report]:
    """Completes a target after all nodes have ended, one of them perhaps while completing it.

    Args:
        direction: The same as the one that wrote the files.
        out: The target.
        seal: Called when all is written, before the target has its name.

    Returns:
        The report of every unit.

    Raises:
        ValueError: Files are not finished.
    """
    journal = Journal(out, direction.options())
    missing = _missing(direction, journal)
    if missing:
        raise ValueError(
            f"{journal.staging}: {len(missing)} of {len(direction.units())} files are not "
            f"finished, the first is {missing[0]}; start the nodes again that were to write them"
        )
    return _complete(direction, journal, seal, force=True) or {}


def _complete(
    direction: Direction, journal: Journal, seal: Seal, *, force: bool
) -> Mapping[str, Report] | None:
    """Writes what comes after all files; None: some are missing, or another node does it or did.

    Args:
        direction: What is converted.
        journal: Of the target.
        seal: Called at the end.
        force: Do it even if another node seems to be at it.
    """
    if _missing(direction, journal) or not journal.claim_end(force=force):
        return None
    try:
        found = {unit.name: journal.entry(unit.name) for unit in direction.units()}
        entries = {name: entry for name, entry in found.items() if entry is not None}
        reports = {name: entry.report for name, entry in entries.items()}
        for stray in journal.staging.glob("*.part"):
            stray.unlink(missing_ok=True)
        direction.finish(journal.staging, reports)
        seal(journal.staging, entries)
    except BaseException:
        journal.release_end()
        raise
    journal.close()
    return reports


def _missing(direction: Direction, journal: Journal) -> list[str]:
    """Units that are not finished."""
    entries = {unit.name: journal.entry(unit.name) for unit in direction.units()}
    return [
        name
        for name, entry in entries.items()
        if entry is None or not _has_size(journal.staging / name, entry.size)
    ]


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _check_space(journal: Journal, units: Sequence[Unit]) -> None:
    """Raises ValueError, and leaves nothing, if the disk cannot hold what is to be written."""
    needed = _SPARE_BYTES + sum(u.num_bytes for u in units if journal.entry(u.name) is None)
    free = shutil.disk_usage(journal.staging).free
    if needed > free:
        if not any(journal.entry(unit.name) for unit in units):
            journal.discard()
        raise ValueError(
            f"{journal.out}: needs {needed:,} bytes more, the disk has {free:,}; free space or "
            f"choose another place"
        )
