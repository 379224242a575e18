"""Unpickling that runs nothing: only the classes that a `torch_dist` checkpoint is made of.

`.metadata`, `common.pt` and what is inside of `.distcp` files are pickles, and a pickle may name
any function of any module to be called. Here a name that is not listed ends the reading.
"""

import argparse
import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.serialization import _get_layout

from megatron_dsv3.convert.mapping import Shape


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a `torch.save` archive, without its numbers."""

    record: str
    """Of the archive: `data/0`."""
    dtype: torch.dtype
    shape: Shape
    stride: Shape
    start: int
    """First element inside the record."""

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    @property
    def is_contiguous(self) -> bool:
        """Whether the numbers lie in a row."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _rebuild(
    storage: tuple[str, torch.dtype], start: int, shape: Shape, stride: Shape, *_: object
) -> StoredTensor:
    record, dtype = storage
    return StoredTensor(f"data/{record}", dtype, tuple(shape), tuple(stride), start)


_PLAIN: Mapping[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch.Size": torch.Size,
    "pathlib.PosixPath": PosixPath,
    "pathlib._local.PosixPath": PosixPath,
    **{str(dtype): dtype for dtype in (*_DTYPES.values(), torch.float8_e4m3fn)},
}
_INDEX: Mapping[str, Any] = {
    **_PLAIN,
    "torch.serialization._get_layout": _get_layout,
    "torch.distributed.checkpoint.filesystem._StorageInfo": filesystem._StorageInfo,
    **{
        f"torch.distributed.checkpoint.metadata.{name}": getattr(metadata, name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
            *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
            "_MEM_FORMAT_ENCODING",
        )
    },
}
_ARCHIVE: Mapping[str, Any] = {
    **_PLAIN,
    "argparse.Namespace": argparse.Namespace,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Knows the given names and no other."""

    def __init__(self, content: bytes, admitted: Mapping[str, Any], where: str) -> None:
        super().__init__(io.BytesIO(content))
        self._admitted = admitted
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        """Gives what is listed under a name."""
        if (full := f"{module}.{name}") not in self._admitted:
            raise ValueError(
                f"{self._where}: a pickle names {full}, which no checkpoint needs; it was not run: "
                f"do not use this file"
            )
        return self._admitted[full]

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        """Gives record and type of a storage."""
        kind, dtype, record, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError(f"{self._where}: a pickle names a storage of an unknown kind")
        return str(record), dtype


def load_index(path: Path) -> metadata.Metadata:
    """Reads a `.metadata` file.

    Raises:
        ValueError: It is damaged, or names a class that such files do not need.
    """
    found = _load(path.read_bytes(), _INDEX, str(path))
    if not isinstance(found, metadata.Metadata):
        raise ValueError(f"{path}: expected the index of a checkpoint, got {type(found).__name__}")
    return found


def load_archive(archive: zipfile.ZipFile, where: str) -> Any:
    """What `torch.save` put into an archive; tensors come as `StoredTensor`.

    Raises:
        ValueError: It is damaged, or names a class that such files do not need.
    """
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise ValueError(f"{where}: expected one data.pkl in it, got {names}; it is damaged")
    entry = archive.getinfo(names[0])
    if entry.CRC == 0:  # torch.serialization.set_crc32_options(False)
        del entry.CRC
    try:
        content = archive.read(entry)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{where}: truncated or damaged ({error}); copy it again") from None
    return _load(content, _ARCHIVE, where)


def _load(content: bytes, admitted: Mapping[str, Any], where: str) -> Any:
    try:
        return _Unpickler(content, admitted, where).load()
    except ValueError:
        raise
    # A damaged pickle can fail in any of its instructions.
    except Exception as error:
        raise ValueError(f"{where}: truncated or damaged ({error!r}); copy it again") from None
