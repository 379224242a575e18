"""A Megatron-Core (`torch_dist`) checkpoint, read tensor by tensor without a model.

A tensor is stored in chunks, each a `torch.save` archive inside of a `.distcp` file; `.metadata`
says where. Any rectangle of any tensor can be read, and no other bytes are.
"""

import io
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_dsv3.convert.hf_index import listed
from megatron_dsv3.convert.mapping import Shape
from megatron_dsv3.convert.safe_pickle import StoredTensor, load_archive, load_index
from megatron_dsv3.convert.safetensors_file import TensorInfo

INDEX = ".metadata"
CONFIG = "metadata.json"
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
COMMON = "common_state/shard_0_1"
"""Where Megatron-Core 0.19 keeps what is not sharded; before, it was in `common.pt`."""
DCP_VERSION = "1.0.0"
AHEAD_BYTES = 16 << 20
"""Fetched behind what is read: the next part of a tensor, or the next tensor, lies there."""
_NUM_CACHED = 256
"""Chunks whose archives need not be opened again: tensors are read piece by piece."""


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of a file."""

    file: Path
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A rectangle of a tensor and where it is stored."""

    offsets: Shape
    sizes: Shape
    place: Place


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Where the numbers of a chunk begin in its file."""

    stored: StoredTensor
    position: int


class MegatronReader:
    """The tensors of a checkpoint directory under their sharded keys.

    It can be sent to another process, which then need not read the index: that of a training run of
    the 671B takes 600 MB to read.
    """

    def __init__(self, directory: Path) -> None:
        """Reads and checks the index; no tensor is touched.

        Raises:
            ValueError: The directory does not hold one complete checkpoint.
        """
        self.directory = directory
        _check_backend(directory)
        index = load_index(directory / INDEX)
        if index.version not in (None, DCP_VERSION):
            raise ValueError(
                f"{directory / INDEX}: expected version {DCP_VERSION}, got {index.version}; load "
                f"and save it with the torch that wrote it"
            )
        self._tensors, self.objects = _contents(directory, index)
        self._numbers = lru_cache(_NUM_CACHED)(_numbers)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_numbers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._numbers = lru_cache(_NUM_CACHED)(_numbers)

    def only(self, keys: Iterable[str]) -> "MegatronReader":
        """A reader that knows these tensors and nothing else."""
        narrow = copy(self)
        narrow._tensors = {key: self._tensors[key] for key in keys}
        narrow.objects = {}
        return narrow

    def info(self, key: str) -> TensorInfo:
        """A tensor's type and whole shape."""
        if key not in self._tensors:
            raise ValueError(f"{self.directory}: has no tensor {key}")
        return self._tensors[key][0]

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor's type and whole shape."""
        return {key: info for key, (info, _) in self._tensors.items()}

    def common(self) -> Any:
        """What is stored once for all ranks; tensors in it come as `StoredTensor`."""
        legacy = self.directory / "common.pt"
        if legacy.exists():
            place = Place(legacy, 0, legacy.stat().st_size)
            return load_archive(_archive(place), str(legacy))
        if COMMON not in self.objects:
            raise ValueError(f"{self.directory}: has no common state; it is only half a checkpoint")
        place = self.objects[COMMON]
        return load_archive(_archive(place), str(place.file))[0]

    def read(
        self, key: str, cut: Sequence[slice] | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """A tensor or a rectangle of it.

        Args:
            key: One of `infos()`.
            cut: One slice with start and stop for each dim; None: everything.
            out: Where to write, instead of a new tensor.
        """
        info, chunks = self.info(key), self._tensors[key][1]
        box = list(cut) if cut is not None else [slice(0, size) for size in info.shape]
        shape = tuple([part.stop - part.start for part in box])
        out = torch.empty(shape, dtype=info.dtype) if out is None else out
        for chunk in chunks:
            if (common := _overlap(chunk, box)) is not None:
                self._copy(key, info, chunk, common, out[_relative(common, box)])
        return out

    def _copy(
        self, key: str, info: TensorInfo, chunk: Chunk, common: list[slice], target: Tensor
    ) -> None:
        """Reads the rows of a chunk that hold `common`, and copies those numbers."""
        numbers = self._numbers(chunk.place)
        stored = numbers.stored
        if TensorInfo(stored.dtype, stored.shape) != TensorInfo(info.dtype, chunk.sizes):
            raise ValueError(
                f"{chunk.place.file}: {key}: the index has {info.dtype} {list(chunk.sizes)}, the "
                f"file {stored.dtype} {list(stored.shape)}; index and files are of two checkpoints"
            )
        inside = [
            slice(part.start - offset, part.stop - offset)
            for part, offset in zip(common, chunk.offsets, strict=True)
        ]
        lead = _single_dims(inside)
        row = int(np.prod(chunk.sizes[lead + 1 :], dtype=np.int64)) * info.dtype.itemsize
        first = int(np.ravel_multi_index([p.start for p in inside[:lead]], chunk.sizes[:lead]))
        first = first * chunk.sizes[lead] + inside[lead].start if lead < len(inside) else 0
        count = inside[lead].stop - inside[lead].start if lead < len(inside) else 1
        direct = target.is_contiguous() and all(
            part == slice(0, size)
            for part, size in zip(inside[lead + 1 :], chunk.sizes[lead + 1 :], strict=True)
        )
        direct = direct and target.dtype == info.dtype
        rows = (
            target if direct else torch.empty((count, *chunk.sizes[lead + 1 :]), dtype=info.dtype)
        )
        _read_into(chunk.place.file, numbers.position + first * row, rows)
        if not direct:
            target.copy_(rows[(slice(None), *inside[lead + 1 :])].view(target.shape))


def _single_dims(box: Sequence[slice]) -> int:
    """Leading dims of which one element is taken: what follows lies in a row of the file."""
    lead = 0
    while lead < len(box) - 1 and box[lead].stop - box[lead].start == 1:
        lead += 1
    return lead


def _overlap(chunk: Chunk, box: Sequence[slice]) -> list[slice] | None:
    common = []
    for offset, size, part in zip(chunk.offsets, chunk.sizes, box, strict=True):
        start, stop = max(offset, part.start), min(offset + size, part.stop)
        if start >= stop:
            return None
        common.append(slice(start, stop))
    return common


def _relative(inner: Sequence[slice], outer: Sequence[slice]) -> tuple[slice, ...]:
    return tuple(
        [slice(i.start - o.start, i.stop - o.start) for i, o in zip(inner, outer, strict=True)]
    )


def _read_into(path: Path, position: int, target: Tensor) -> None:
    """Fills a contiguous tensor with the bytes at `position`; the page cache keeps the file."""
    view = memoryview(target.view(-1).view(torch.uint8).numpy())
    handle = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            ahead = len(view) + AHEAD_BYTES
            os.posix_fadvise(handle, position, ahead, os.POSIX_FADV_WILLNEED)
        while view:
            count = os.preadv(handle, [view], position)
            if count == 0:
                raise ValueError(f"{path}: ends before byte {position}; copy it again")
            view, position = view[count:], position + count
    finally:
        os.close(handle)


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._file = place.file.open("rb")
        self._at = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._place.length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._place.length - self._at))
        content = os.pread(self._file.fileno(), wanted, self._place.offset + self._at)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


def _archive(place: Place) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(io.BufferedReader(_Window(place)))
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise ValueError(f"{place.file}: truncated or damaged ({error}); copy it again") from None


def _numbers(place: Place) -> _Numbers:
    """Opens a chunk's archive as far as needed to know where its numbers are."""
    try:
        with _archive(place) as archive:
            stored = load_archive(archive, str(place.file))
            if not isinstance(stored, StoredTensor) or not stored.is_contiguous:
                raise ValueError(f"{place.file}: expected a contiguous tensor at {place.offset}")
            record = _record(place, archive, stored)
    except ValueError:
        raise
    # zipfile fails in many ways at what is no archive.
    except Exception as error:
        raise ValueError(
            f"{place.file}: truncated or damaged at byte {place.offset} ({error!r}); copy it again"
        ) from None
    return _Numbers(stored, place.offset + record + stored.start * stored.dtype.itemsize)


def _record(place: Place, archive: zipfile.ZipFile, stored: StoredTensor) -> int:
    """Where a tensor's record begins in its archive."""
    entries = archive.infolist()
    (at,) = [i for i, entry in enumerate(entries) if entry.filename.endswith(f"/{stored.record}")]
    entry = entries[at]
    with place.file.open("rb") as file:
        # Only the local header has the length of the padding that aligns the numbers.
        header = os.pread(file.fileno(), 30, place.offset + entry.header_offset)
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = entry.header_offset + 30 + lengths
    # The next record follows directly, after 16 or 24 bytes of description: nothing else is sure to
    # notice a flipped bit in that length, which would shift all numbers.
    gap = entries[at + 1].header_offset - start - entry.file_size
    needed = stored.nbytes + stored.start * stored.dtype.itemsize
    fits = entry.compress_type == zipfile.ZIP_STORED and entry.file_size >= needed
    if not fits or gap not in (0, 16, 24):
        raise ValueError(f"{place.file}: damaged at byte {place.offset}; copy it again")
    return start


def _check_backend(directory: Path) -> None:
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory; expected a Megatron checkpoint")
    missing = [name for name in (CONFIG, INDEX) if not (directory / name).is_file()]
    if missing:
        raise ValueError(
            f"{directory}: {' and '.join(missing)} missing; it is no torch_dist checkpoint or one "
            f"whose writing did not end"
        )
    try:
        content = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        found = {name: content.get(name) for name in BACKEND}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{directory / CONFIG}: damaged ({error})") from None
    if found != BACKEND:
        raise ValueError(f"{directory / CONFIG}: expected {BACKEND}, got {found}")


def _contents(
    directory: Path, index: Metadata
) -> tuple[dict[str, tuple[TensorInfo, list[Chunk]]], dict[str, Place]]:
    """Tensors with their chunks, and the places of objects, checked against the files."""
    places, problems = _places(directory, index.storage_data or {})
    tensors: dict[str, tuple[TensorInfo, list[Chunk]]] = {}
    objects: dict[str, Place] = {}
    lost, broken = [], []
    for key, kind in index.state_dict_metadata.items():
        if not isinstance(kind, TensorStorageMetadata):
            where = MetadataIndex(key)
            lost += [] if where in places else [key]
            objects |= {key: places[where]} if where in places else {}
            continue
        info = TensorInfo(kind.properties.dtype, tuple(kind.size))
        wheres = [MetadataIndex(key, chunk.offsets) for chunk in kind.chunks]
        lost += [f"{key} {w.offset}" for w in wheres if w not in places]
        chunks = [
            Chunk(tuple(chunk.offsets), tuple(chunk.sizes), places[where])
            for chunk, where in zip(kind.chunks, wheres, strict=True)
            if where in places
        ]
        broken += [] if _tiles(chunks, info.shape) or lost else [key]
        tensors[key] = (info, chunks)
    problems |= {"entries are stored nowhere": lost}
    problems |= {"tensors have holes or parts that are stored twice": broken}
    if found := [listed(what, names) for what, names in problems.items() if names]:
        raise ValueError(f"{directory}: {'; '.join(found)}; copy or save the checkpoint again")
    return tensors, objects


def _places(
    directory: Path, storage: Mapping[MetadataIndex, Any]
) -> tuple[dict[MetadataIndex, Place], dict[str, list[str]]]:
    files = {info.relative_path for info in storage.values()}
    outside = sorted(f for f in files if PurePath(f).is_absolute() or ".." in PurePath(f).parts)
    sizes = {
        file: (directory / file).stat().st_size
        for file in files - set(outside)
        if (directory / file).is_file()
    }
    paths = {file: directory / file for file in files}
    ends: dict[str, int] = {}
    for info in storage.values():
        file = info.relative_path
        ends[file] = max(ends.get(file, 0), info.offset + info.length)
    problems = {
        "entries are transformed": sorted(
            where.fqn for where, info in storage.items() if info.transform_descriptors
        ),
        "files of the index lie outside of the directory": outside,
        "files of the index are missing": sorted(files - set(outside) - set(sizes)),
        "files are shorter than the index says": sorted(f for f in sizes if sizes[f] < ends[f]),
    }
    places = {
        where: Place(paths[info.relative_path], info.offset, info.length)
        for where, info in storage.items()
    }
    return places, problems


def _tiles(chunks: Sequence[Chunk], shape: Shape) -> bool:
    """Whether the chunks cover a tensor of this shape, each element once."""
    if any(
        o < 0 or s <= 0 or o + s > n
        for chunk in chunks
        for o, s, n in zip(chunk.offsets, chunk.sizes, shape, strict=True)
    ):
        return False
    edges = [sorted({0, n, *_edges(chunks, d)}) for d, n in enumerate(shape)]
    at = [{edge: i for i, edge in enumerate(dim)} for dim in edges]
    times = np.zeros([len(dim) - 1 for dim in edges], dtype=np.int32)
    for chunk in chunks:
        cells = [
            slice(at[d][o], at[d][o + s])
            for d, (o, s) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True))
        ]
        times[tuple(cells)] += 1
    return bool((times == 1).all())


def _edges(chunks: Sequence[Chunk], dim: int) -> Iterator[int]:
    for chunk in chunks:
        yield chunk.offsets[dim]
        yield chunk.offsets[dim] + chunk.sizes[dim]
