"""Which checkpoint to go on from: all ranks look together, and take the same one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_dsv3.checkpoint.directory import Found, clean, find_newest
from megatron_dsv3.checkpoint.manifest import read_manifest, wrong_hashes
from megatron_dsv3.model.groups import Groups, raise_together


def newest_whole(folder: Path, groups: Groups, *, hashes: bool) -> Found:
    """Collective. The newest checkpoint that is whole, and what was ignored.

    Args:
        folder: Of the run; need not exist.
        groups: This rank's place.
        hashes: Read all files; each rank takes its share. Without it sizes alone are compared.

    Raises:
        ValueError: On every rank: the folder cannot be read.
    """
    rejected: dict[str, str] = {}
    while True:
        found = _look(folder, groups, rejected)
        if found.path is None or not hashes:
            return found
        problems = _damages(found.path, groups)
        if not problems:
            return found
        rejected[found.path.name] = "; ".join(problems)


def clean_together(folder: Path, groups: Groups) -> list[str]:
    """Collective. Rank 0 removes what interrupted saves left; returns what was done, there."""
    done, problem = [], ""
    if groups.rank == 0:
        try:
            done = clean(folder)
        except (OSError, ValueError) as error:
            problem = f"checkpoint.dir {folder}: cannot be cleaned: {error}"
    raise_together(problem)
    return done


def _look(folder: Path, groups: Groups, rejected: Mapping[str, str]) -> Found:
    answer: list[Any] = [None]
    problem = ""
    if groups.rank == 0:
        try:
            answer = [find_newest(folder, rejected)]
        except OSError as error:
            problem = f"checkpoint.dir {folder}: {error}"
    raise_together(problem)
    dist.broadcast_object_list(answer, src=0)
    found: Found = answer[0]
    return found


def _damages(path: Path, groups: Groups) -> list[str]:
    """Of all ranks' shares, the same on every rank."""
    try:
        files = sorted(read_manifest(path).items())
        mine = list(wrong_hashes(path, dict(files[groups.rank :: groups.world_size])))
    except ValueError as error:
        mine = [f"rank {groups.rank}: {error}"]
    everyones: list[list[str]] = [[]] * groups.world_size
    dist.all_gather_object(everyones, mine)
    return [problem for part in everyones for problem in part]
