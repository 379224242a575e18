"""The folder of a run's checkpoints: what is whole in it, what is left over, what is kept.

    iter_0000100/                          full: weights, optimizer, everything to go on from
    iter_0000200.incomplete-1f3a/          being written, or left by a process that was killed
    latest_checkpointed_iteration.txt      moves after the rename; Megatron-Core's name for it
    weights/iter_0000100/                  weights alone, kept after the full one was dropped

A checkpoint gets its name by one rename, after its last byte and its manifest are on the disk.
"""

import pickle
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from torch.distributed.checkpoint.metadata import Metadata

from megatron_dsv3.checkpoint.headers import read_metadata
from megatron_dsv3.checkpoint.manifest import (
    read_manifest,
    without_files,
    wrong_sizes,
)
from megatron_dsv3.config.durable import sync, write_durably

LATEST = "latest_checkpointed_iteration.txt"
WEIGHTS = "weights"
OPTIMIZER_FILES = "optimizer"
"""Prefix of the keys, and so of the files, that a checkpoint of weights alone does not need."""
_NAME = re.compile(r"iter_(\d{7,})\Z")
_INCOMPLETE = ".incomplete-"
_DROPPED = ".dropped-"


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint to go on from, and what was passed over to find it."""

    path: Path | None
    """None: there is no whole one."""
    ignored: tuple[str, ...]
    """Which, and why; newest first."""


def name_of(step: int) -> str:
    """Megatron-Core's name of a step's checkpoint."""
    return f"iter_{step:07}"


def step_of(path: Path) -> int:
    """The step that a checkpoint directory was saved after."""
    match = _NAME.match(path.name)
    assert match is not None, f"{path}: not named iter_0000000"
    return int(match[1])


def incomplete_name(step: int) -> str:
    """A name that no other process has: a killed run's writer may still be writing to its own."""
    return f"{name_of(step)}{_INCOMPLETE}{secrets.token_hex(4)}"


def checkpoints(folder: Path) -> list[Path]:
    """Full checkpoints by step, oldest first, whole or not."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if _NAME.match(path.name) and path.is_dir()]
    return sorted(named, key=step_of)


def find_newest(folder: Path, rejected: Mapping[str, str] = MappingProxyType({})) -> Found:
    """The newest whole checkpoint; whole means: a manifest, and all files with their sizes.

    Args:
        folder: Of the run; need not exist.
        rejected: Names of checkpoints that are not to be taken, and why.
    """
    ignored = [f"{path.name}: the save did not finish" for path in left_over(folder)]
    for path in reversed(checkpoints(folder)):
        if path.name in rejected:
            ignored.append(f"{path.name}: {rejected[path.name]}")
            continue
        try:
            problems = list(wrong_sizes(path, read_manifest(path)))
        except ValueError as error:
            problems = [str(error)]
        if not problems:
            return Found(path, tuple(ignored))
        ignored.append(f"{path.name}: {'; '.join(problems)}")
    return Found(None, tuple(ignored))


def left_over(folder: Path) -> list[Path]:
    """What interrupted saves and deletions left, newest first."""
    places = [folder, folder / WEIGHTS]
    found = [
        path
        for place in places
        if place.is_dir()
        for path in place.iterdir()
        if _INCOMPLETE in path.name or _DROPPED in path.name
    ]
    return sorted(found, reverse=True)


def commit(incomplete: Path, step: int) -> Path:
    """Gives a finished checkpoint its name, then moves `latest`."""
    folder, target = incomplete.parent, incomplete.with_name(name_of(step))
    if target.exists():  # an ignored one, of the same step
        _drop(target)
    incomplete.rename(target)
    sync(folder)
    write_durably(folder / LATEST, f"{step}\n")
    return target


def retain(folder: Path, *, keep_last: int, keep_weights_every: int | None) -> list[str]:
    """Drops full checkpoints but the newest ones; call after a commit.

    Args:
        folder: Of the run.
        keep_last: Full ones that stay, counted among whole ones alone.
        keep_weights_every: A dropped one whose step is a multiple stays as weights alone.

    Returns:
        What was done, one line each.
    """
    done = []
    whole = [path for path in checkpoints(folder) if _is_whole(path)]
    newest = whole[-1] if whole else None
    for path in whole[: -max(keep_last, 1)]:
        assert path != newest
        if keep_weights_every and step_of(path) % keep_weights_every == 0:
            keep_weights(path)
            done.append(f"{path.name}: kept its weights, dropped the optimizer")
        else:
            _drop(path)
            done.append(f"{path.name}: dropped")
    return done


def clean(folder: Path) -> list[str]:
    """Removes what interrupted saves left and finishes interrupted prunings."""
    done = []
    for path in left_over(folder):
        if path.parent.name == WEIGHTS and (path / "manifest.json").exists():
            _finish_pruning(path)
            done.append(f"{path.name}: kept its weights")
        else:
            shutil.rmtree(path)
            done.append(f"{path.name}: removed")
    return done


def keep_weights(path: Path) -> Path:
    """Moves a full checkpoint to `weights/` and takes the optimizer out of it."""
    place = path.parent / WEIGHTS
    place.mkdir(exist_ok=True)
    pruned = place / incomplete_name(step_of(path))
    path.rename(pruned)
    return _finish_pruning(pruned)


def _finish_pruning(path: Path) -> Path:
    """Each step may be done again after a kill."""
    gone = [file.name for file in path.glob(f"{OPTIMIZER_FILES}*.distcp")]
    metadata = read_metadata(path)
    _without(metadata, OPTIMIZER_FILES)
    beside = path / ".metadata.tmp"
    beside.write_bytes(pickle.dumps(metadata))
    beside.replace(path / ".metadata")
    without_files(path, gone, [".metadata"])
    for name in gone:
        (path / name).unlink()
    target = path.with_name(path.name.partition(_INCOMPLETE)[0])
    if target.exists():
        _drop(target)
    path.rename(target)
    sync(target.parent)
    return target


def _without(metadata: Metadata, prefix: str) -> None:
    """What Megatron-Core's `remove_sharded_tensors` does to the metadata."""
    keep = {k: v for k, v in metadata.state_dict_metadata.items() if not k.startswith(prefix)}
    metadata.state_dict_metadata = keep
    metadata.planner_data = {
        key: value for key, value in (metadata.planner_data or {}).items() if key in keep
    }
    metadata.storage_data = {
        index: where
        for index, where in (metadata.storage_data or {}).items()
        if not index.fqn.startswith(prefix)
    }


def _is_whole(path: Path) -> bool:
    try:
        return not any(wrong_sizes(path, read_manifest(path)))
    except ValueError:
        return False


def _drop(path: Path) -> None:
    """Out of sight first: a deletion that is cut short must not leave half a checkpoint."""
    hidden = path.with_name(f"{path.name}{_DROPPED}{secrets.token_hex(4)}")
    path.rename(hidden)
    shutil.rmtree(hidden)
