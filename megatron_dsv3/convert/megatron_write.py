"""Hugging Face -> a Megatron-Core (`torch_dist`) checkpoint that any layout loads.

The plan says which rows of which HF tensor become which chunk of which file; each worker needs no
more than that. A chunk is one `torch.save` archive, as Megatron-Core writes them, small enough to
be held in memory; `.metadata`, written last, says where all of them are.
"""

import io
import json
import pickle
import shutil
from collections.abc import Buffer, Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.durable import sync, write_synced
from megatron_dsv3.convert.direct_file import DirectFile
from megatron_dsv3.convert.hf_index import listed
from megatron_dsv3.convert.hf_io import copy_tokenizer_files
from megatron_dsv3.convert.journal import Report, Written
from megatron_dsv3.convert.mapping import Shape, by_hf_name
from megatron_dsv3.convert.megatron_io import BACKEND, COMMON, CONFIG, DCP_VERSION, INDEX
from megatron_dsv3.convert.megatron_layout import Box, MegatronLayout, layouts
from megatron_dsv3.convert.memory import PIECE_BYTES
from megatron_dsv3.convert.offline import Unit
from megatron_dsv3.convert.safetensors_file import TensorInfo, explained
from megatron_dsv3.convert.sources import HFSource, fingerprint

FILE_BYTES = 2_000_000_000
_ALIGNMENT = 64
"""Where archives begin, so that the numbers inside of them are aligned in the file as well."""
_ARCHIVE_BYTES = 2048
"""Of an archive besides its numbers, at most."""
OBJECTS = "__0_0.distcp"
"""The file of what is no tensor."""


@dataclass(frozen=True, slots=True)
class PlannedChunk:
    """Rows of an HF tensor that are stored as one chunk."""

    name: str
    rows: slice
    info: TensorInfo
    """Of the rows, as they are stored."""
    key: str
    offsets: Shape
    sizes: Shape


@dataclass(frozen=True, slots=True)
class MegatronPlan:
    """A checkpoint before its numbers are there."""

    files: Mapping[str, tuple[PlannedChunk, ...]]
    tensors: Mapping[str, TensorInfo]
    """Type and whole shape of each sharded tensor."""
    objects: tuple[str, ...]


def plan(
    arch: Architecture,
    layout: MegatronLayout,
    infos: Mapping[str, TensorInfo],
    *,
    file_bytes: int = FILE_BYTES,
) -> MegatronPlan:
    """Cuts tensors into chunks and fills files with them, in the order of the model.

    Args:
        arch: The model.
        layout: Where its tensors go.
        infos: What a source gives for each HF name.
        file_bytes: Largest file, if no chunk is larger.

    Raises:
        ValueError: Tensors that Megatron-Core joins to one are of different types.
    """
    table = by_hf_name(arch)
    tensors: dict[str, TensorInfo] = {}
    chunks: list[PlannedChunk] = []
    mixed = []
    for name, box in layout.boxes.items():
        # The bias is added to fp32 scores; in bf16 it would choose other experts.
        dtype = torch.float32 if table[name].is_buffer else infos[name].dtype
        whole = TensorInfo(dtype, layout.shapes[box.key])
        if tensors.setdefault(box.key, whole) != whole:
            mixed.append(f"{name} {dtype} beside {tensors[box.key].dtype}")
        chunks += _chunks(name, box, dtype)
    if mixed:
        raise ValueError(
            f"{listed('tensors differ in type from those they are joined with', mixed)}; write "
            f"them in one type"
        )
    files = {
        f"__{number}_0.distcp": tuple(group)
        for number, group in enumerate(_groups(chunks, file_bytes), start=1)
    }
    return MegatronPlan(files, tensors, layout.objects)


def _chunks(name: str, box: Box, dtype: torch.dtype) -> Iterator[PlannedChunk]:
    num_rows, *rest = box.hf_shape
    row = TensorInfo(dtype, tuple(rest))
    step = max(1, PIECE_BYTES // row.nbytes)
    lead = box.num_leading
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        offsets = (*box.offsets[:lead], box.offsets[lead] + start, *box.offsets[lead + 1 :])
        sizes = (*box.sizes[:lead], stop - start, *box.sizes[lead + 1 :])
        info = TensorInfo(dtype, (stop - start, *rest))
        yield PlannedChunk(name, slice(start, stop), info, box.key, offsets, sizes)


def _groups(chunks: Sequence[PlannedChunk], file_bytes: int) -> Iterator[list[PlannedChunk]]:
    group: list[PlannedChunk] = []
    size = 0
    for chunk in chunks:
        if group and size + chunk.info.nbytes > file_bytes:
            yield group
            group, size = [], 0
        group.append(chunk)
        size += chunk.info.nbytes
    yield group


@dataclass(frozen=True)
class ToMegatron:
    """The direction HF -> Megatron, for the engine."""

    source: HFSource
    plan: MegatronPlan

    @classmethod
    def open(cls, hf_dir: Path, *, file_bytes: int = FILE_BYTES) -> "ToMegatron":
        """Checks the directory against its config.json and plans.

        Raises:
            ValueError: It does not hold one whole model.
        """
        arch = Architecture.from_hf(hf_dir)
        source = HFSource(hf_dir, arch)
        source.check()
        layout = layouts(arch)[0]
        return cls(source, plan(arch, layout, source.infos(), file_bytes=file_bytes))

    def options(self) -> Mapping[str, Any]:
        """What the result depends on."""
        return {
            "to": "megatron",
            "source": fingerprint(self.source.directory),
            "files": {name: len(chunks) for name, chunks in self.plan.files.items()},
        }

    def units(self) -> list[Unit]:
        """One for each `.distcp` file of tensors."""
        return [
            Unit(name, sum(chunk.info.nbytes + _ARCHIVE_BYTES for chunk in chunks))
            for name, chunks in self.plan.files.items()
        ]

    def write(
        self, unit: str, path: Path, *, piece_bytes: int, on_bytes: Callable[[int], None]
    ) -> Written:
        """Writes one file and reports where its chunks begin and how long they are."""
        assert piece_bytes >= PIECE_BYTES
        places = []
        # Reused for all chunks: page faults in new memory cost more than copying into old.
        memory = bytearray(max(chunk.info.nbytes for chunk in self.plan.files[unit]))
        with explained(path), closing(DirectFile(path)) as file:
            end = _End(file)
            for chunk in self.plan.files[unit]:
                tensor = self._read(chunk, memory)
                offset = _align(end)
                end.save(tensor.view(chunk.sizes))
                places.append([offset, end.tell() - offset])
                on_bytes(chunk.info.nbytes + _ARCHIVE_BYTES)
            parts = file.finish()
        return Written(parts, {"places": places})

    def _read(self, chunk: PlannedChunk, memory: bytearray) -> Tensor:
        count = chunk.info.nbytes // chunk.info.dtype.itemsize
        # A view of a larger tensor would be saved with all of that tensor's memory.
        target = torch.frombuffer(memory, dtype=chunk.info.dtype, count=count)
        out = target.view(chunk.info.shape)
        return self.source.read(chunk.name, chunk.rows, out=out)

    def finish(self, folder: Path, reports: Mapping[str, Report]) -> None:
        """Writes objects, index, config.json, tokenizer files."""
        with explained(folder):
            objects = _write_objects(folder / OBJECTS, self.plan.objects)
            index = _index(self.plan, reports, objects)
            write_synced(folder / INDEX, pickle.dumps(index))
            write_synced(folder / CONFIG, json.dumps(BACKEND).encode())
            # So that the way back needs nothing but the checkpoint.
            shutil.copyfile(self.source.directory / "config.json", folder / "config.json")
            copy_tokenizer_files(self.source.directory, folder)
            sync(folder)


class _End:
    """The growing end of a file, as `torch.save` writes to it."""

    def __init__(self, file: DirectFile) -> None:
        self._file = file
        self._position = 0
        self._error: OSError | None = None

    def save(self, tensor: Tensor) -> None:
        """Appends an archive.

        Raises:
            OSError: The reason, of which torch tells only that it failed.
        """
        try:
            torch.save(tensor, self)  # type: ignore[arg-type]  # it needs nothing more
        except Exception:
            if self._error is not None:
                raise self._error from None
            raise

    def write(self, content: Buffer) -> int:
        count = memoryview(content).nbytes
        try:
            self._file.write(content, self._position)
        except OSError as error:
            self._error = error
            raise
        self._position += count
        return count

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        """The file's owner does that."""


class _Growing(Protocol):
    def write(self, content: bytes, /) -> int: ...

    def tell(self) -> int: ...


def _align(file: _Growing) -> int:
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
    return file.tell()


def _write_objects(path: Path, keys: Sequence[str]) -> dict[str, _StorageInfo]:
    """Stores the common state, and one empty `_extra_state` for all keys."""
    stored: dict[str, _StorageInfo] = {}
    content = io.BytesIO()
    for key, value in ((COMMON, {}), (keys, torch.empty(0, dtype=torch.uint8))):
        offset = _align(content)
        torch.save([value], content)
        info = _StorageInfo(path.name, offset, content.tell() - offset)
        stored |= dict.fromkeys([key] if isinstance(key, str) else key, info)
    write_synced(path, content.getvalue())
    return stored


def _index(
    plan: MegatronPlan, reports: Mapping[str, Report], objects: Mapping[str, _StorageInfo]
) -> Metadata:
    chunks: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in plan.tensors}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for file, planned in plan.files.items():
        for chunk, (offset, length) in zip(planned, reports[file]["places"], strict=True):
            siblings = chunks[chunk.key]
            where = MetadataIndex(chunk.key, chunk.offsets, len(siblings))
            siblings.append(
                ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
            )
            storage[where] = _StorageInfo(file, offset, length)
    tensors: dict[str, Any] = {
        key: TensorStorageMetadata(
            TensorProperties(dtype=info.dtype), torch.Size(info.shape), chunks[key]
        )
        for key, info in plan.tensors.items()
    }
    storage |= {MetadataIndex(key): info for key, info in objects.items()}
    return Metadata(
        tensors | {key: BytesStorageMetadata() for key in objects},
        storage_data=storage,
        version=DCP_VERSION,
    )
