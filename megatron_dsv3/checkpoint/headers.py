"""Reads what a checkpoint says of its tensors without loading or trusting them.

Megatron-Core pickles `.metadata`: here it is read by an unpickler that knows just the records it is
made of, so that looking at a damaged or foreign checkpoint runs none of its code.
"""

import io
import math
import pickle
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

_MODULES = {
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.planner",
}
_OTHERS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "Path"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
}


class _Records(pickle.Unpickler):
    """Builds the records of `.metadata` and refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        found = None
        if module in _MODULES and "." not in name:
            found = super().find_class(module, name)
        if isinstance(found, type) or (module, name) in _OTHERS:
            return found or super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor's shard, or an object, as it is stored."""

    key: str
    file: str
    offset: int
    length: int
    num_bytes: int | None
    """Of the tensor itself; None: an object."""


def read_metadata(directory: Path) -> Metadata:
    """The records of `.metadata`.

    Raises:
        ValueError: It is missing, damaged, or holds something else.
    """
    path = directory / ".metadata"
    try:
        metadata = _Records(io.BytesIO(path.read_bytes())).load()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise ValueError(f"{path}: not the metadata of a checkpoint: {error}") from None
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path}: expected Metadata, got {type(metadata).__name__}")
    return metadata


def stored_items(metadata: Metadata) -> list[Item]:
    """Every shard and object, in the order of files and offsets."""
    items = []
    for index, where in metadata.storage_data.items():
        assert isinstance(where, _StorageInfo)
        size = _num_bytes(metadata, index)
        items.append(Item(index.fqn, str(where.relative_path), where.offset, where.length, size))
    return sorted(items, key=lambda item: (item.file, item.offset))


def header_problems(directory: Path, metadata: Metadata) -> Iterator[str]:
    """Tensors that are not where the metadata says, or not what it says."""
    items = stored_items(metadata)
    stored = Counter(item.key for item in items)
    for key, expected in metadata.state_dict_metadata.items():
        chunks = len(expected.chunks) if isinstance(expected, TensorStorageMetadata) else 1
        if stored[key] != chunks:
            yield f"{key}: {stored[key]} of {chunks} shards are stored"
    for name, inside in groupby(items, key=lambda item: item.file):
        try:
            with (directory / name).open("rb") as file:
                for item in inside:
                    if problem := _problem(file, item):
                        yield f"{item.key} in {name}: {problem}"
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror}"


def _num_bytes(metadata: Metadata, index: MetadataIndex) -> int | None:
    expected = metadata.state_dict_metadata[index.fqn]
    if isinstance(expected, BytesStorageMetadata):
        return None
    shapes = {tuple(chunk.offsets): chunk.sizes for chunk in expected.chunks}
    shape = shapes[tuple(index.offset or (0,) * len(expected.size))]
    return math.prod(shape) * expected.properties.dtype.itemsize


def _problem(file: BinaryIO, item: Item) -> str | None:
    """Why this is not the stored tensor; torch.save's archive keeps its bytes as `*/data/0`."""
    window = _Window(file, item.offset, item.length)
    try:
        entries = zipfile.ZipFile(window).infolist()
    except zipfile.BadZipFile as error:
        return f"not what torch.save writes: {error}"
    sizes = {entry.filename.partition("/")[2]: entry.file_size for entry in entries}
    if item.num_bytes is not None and sizes.get("data/0", 0) != item.num_bytes:
        return f"holds {sizes.get('data/0', 0)} bytes, expected {item.num_bytes}"
    return None


class _Window(io.RawIOBase):
    """Part of a file as a file; the directory of an archive is read without its content."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise OSError("before the beginning")  # as a file does
        self.position = base + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.length - self.position)
        self.file.seek(self.offset + self.position)
        content = self.file.read(left if size < 0 else min(size, left))
        self.position += len(content)
        return content
