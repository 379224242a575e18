"""`megatron-dsv3 verify CHECKPOINT`: is a checkpoint whole, file by file, tensor by tensor?

Reads every file once and trusts none: nothing of the checkpoint is executed or loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_dsv3.checkpoint.directory import find_newest
from megatron_dsv3.checkpoint.headers import header_problems, read_metadata
from megatron_dsv3.checkpoint.manifest import read_manifest, wrong_hashes, wrong_sizes

_MOST_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Summary:
    """Of a whole checkpoint."""

    path: Path
    num_files: int
    num_bytes: int
    num_tensors: int
    has_optimizer: bool


def is_checkpoint(directory: Path) -> bool:
    """Whether `verify_checkpoint` is the one to ask: a checkpoint, or a run's folder of them."""
    return (directory / ".metadata").exists() or any(directory.glob("iter_*"))


def run(directory: Path, tell: Callable[[str], None]) -> None:
    """Checks one checkpoint, or the newest one of a folder, and says what it holds.

    Raises:
        ValueError: It is not whole; every damaged, missing or short file and tensor is named.
    """
    path = directory
    if not (directory / ".metadata").exists() and any(directory.glob("iter_*")):
        found = find_newest(directory)
        for reason in found.ignored:
            tell(f"ignored {reason}")
        if found.path is None:
            raise ValueError(f"{directory}: no whole checkpoint in it")
        path = found.path
    summary = verify_checkpoint(path)
    optimizer = "with the optimizer" if summary.has_optimizer else "weights alone"
    tell(
        f"{path}: whole; {summary.num_files} files, {summary.num_bytes / 1e9:,.2f} GB, "
        f"{summary.num_tensors:,} tensors, {optimizer}"
    )


def verify_checkpoint(path: Path) -> Summary:
    """Compares sizes and hashes with the manifest, and every stored tensor with the metadata.

    Raises:
        ValueError: All problems, listed.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory; expected a checkpoint (iter_0000100)")
    files = read_manifest(path)
    problems = list(wrong_sizes(path, files))
    right_size = {
        n: r for n, r in files.items() if not any(p.startswith(f"{n} ") for p in problems)
    }
    problems += wrong_hashes(path, right_size)
    problems += [
        f"{file.name} is not in the manifest"
        for file in sorted(path.iterdir())
        if file.name not in files and file.name != "manifest.json"
    ]
    if not any(problem.startswith(".metadata ") for problem in problems):
        metadata = read_metadata(path)
        problems += header_problems(path, metadata)
    if problems:
        more = len(problems) - _MOST_SHOWN
        shown = problems[:_MOST_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise ValueError(f"{path}: not whole: {'; '.join(shown)}")
    keys = [
        key
        for key, value in metadata.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata)
    ]
    return Summary(
        path,
        num_files=len(files),
        num_bytes=sum(record.size for record in files.values()),
        num_tensors=len(keys),
        has_optimizer=any(key.startswith("optimizer.") for key in keys),
    )
