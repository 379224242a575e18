"""A hash by which nodes tell whether they see the same files, without reading terabytes.

Names, sizes, and of each large file its two ends and some blocks between: another revision, a copy
that was cut short and a mount that is missing are found; a flipped bit may not be.
"""

from collections.abc import Iterable
from pathlib import Path

import xxhash

WHOLE = 1 << 20
"""Bytes up to which a file is read from beginning to end."""
_BLOCK = 1 << 16
_NUM_BLOCKS = 10
_MODEL_KINDS = (".json", ".safetensors", ".jinja", ".model", ".txt")


def sampled_hash(files: Iterable[Path]) -> str:
    """XXH3 of the files in their order.

    Raises:
        OSError: One cannot be read.
    """
    digest = xxhash.xxh3_128()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb", buffering=0) as file:
            for start, length in _blocks(size):
                file.seek(start)
                digest.update(file.read(length))
    return digest.hexdigest()


def model_files(hf_dir: Path) -> list[Path]:
    """What a training reads of a Hugging Face directory.

    Raises:
        FileNotFoundError: There is nothing.
    """
    files = sorted(path for path in hf_dir.glob("*") if path.suffix in _MODEL_KINDS)
    if not files:
        raise FileNotFoundError(f"{hf_dir}: no such directory, or no model in it")
    return files


def _blocks(size: int) -> list[tuple[int, int]]:
    if size <= WHOLE:
        return [(0, size)]
    last = size - _BLOCK
    return [(last * index // (_NUM_BLOCKS - 1), _BLOCK) for index in range(_NUM_BLOCKS)]
