"""One safetensors file: its header, or the whole file written tensor by tensor in any order.

The library's own `save_file` wants all tensors of a file in memory; `SafetensorsWriter` wants one.
"""

import ctypes
import json
import mmap
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_dsv3.convert.mapping import Shape

if TYPE_CHECKING:
    from megatron_dsv3.convert.direct_file import Part

_LIBC = ctypes.CDLL(None)
DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""What a DeepSeek checkpoint can hold, as safetensors spells it."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor without its numbers."""

    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return self.dtype.itemsize * prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def info_of(tensor: Tensor) -> TensorInfo:
    """The tensor's type and shape."""
    return TensorInfo(tensor.dtype, tuple(tensor.shape))


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an OSError of writing into one that says what could not be written, and what helps."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"{path}: cannot be written ({reason}); free space or choose another place"
        ) from error


def open_safetensors(path: Path) -> Any:
    """Maps a file; the result's `get_tensor` and `get_slice` give views of the mapping."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated or damaged ({error}); fetch it again") from None


def read_ahead(tensor: Tensor, more_bytes: int) -> None:
    """Has the system fetch a view of a mapped file, and what follows it there, in large requests.

    Else each page that is touched and not in memory is waited for, with 128 KB around it.
    """
    madvise = getattr(_LIBC, "madvise", None)
    if madvise is not None and hasattr(mmap, "MADV_WILLNEED"):
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        stop = tensor.data_ptr() + tensor.nbytes + more_bytes
        # Advice that is not taken changes nothing: beyond the file's end there is none to take.
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_WILLNEED)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """All tensors of a file, in the order of their bytes.

    Raises:
        ValueError: The file's size is not what its header says, or a tensor has a type that no
            DeepSeek checkpoint has.
    """
    with open_safetensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.offset_keys()}
        kinds = {name: part.get_dtype() for name, part in slices.items()}
        if unknown := [f"{name} {kind}" for name, kind in kinds.items() if kind not in DTYPES]:
            known, found = ", ".join(DTYPES), ", ".join(unknown[:20])
            raise ValueError(f"{path}: expected tensors of {known}, got {found}")
        return {
            name: TensorInfo(DTYPES[kinds[name]], tuple(part.get_shape()))
            for name, part in slices.items()
        }


class SafetensorsWriter:
    """Writes a file of known layout; the end of its `with` block syncs it and misses no tensor."""

    def __init__(self, path: Path, layout: Mapping[str, TensorInfo]) -> None:
        """Creates the file in its final size and writes the header.

        Args:
            path: The file; one that exists is overwritten.
            layout: Every tensor that will be written.
        """
        # Imported here: those who only read, serving among them, may have no xxhash.
        from megatron_dsv3.convert.direct_file import DirectFile

        self.path = path
        self._layout = dict(layout)
        self._missing = {name: info.nbytes for name, info in layout.items()}
        self.parts: list[Part] = []
        """What the file consists of, once it is finished."""
        header, self._starts = _header(layout)
        size = len(header) + sum(info.nbytes for info in layout.values())
        with explained(self.path):
            self._file = DirectFile(path, size)
            self._file.write(header, 0)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor, from any device."""
        self._check_known(name)
        if (got := info_of(tensor)) != self._layout[name]:
            raise ValueError(f"{self.path}: {name}: expected {self._layout[name]}, got {got}")
        self.append(name, tensor)

    def append(self, name: str, rows: Tensor) -> None:
        """Writes the next rows of a tensor; those of several tensors may alternate."""
        self._check_known(name)
        info, missing = self._layout[name], self._missing[name]
        fits = rows.dtype == info.dtype and tuple(rows.shape[1:]) == info.shape[1:]
        if not fits or rows.nbytes > missing:
            raise ValueError(
                f"{self.path}: {name}: expected rows of {info}, {missing} bytes of it, got "
                f"{info_of(rows)}"
            )
        octets = rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        with explained(self.path):
            self._file.write(octets.numpy().data, self._starts[name] + info.nbytes - missing)
        self._missing[name] -= rows.nbytes

    def _check_known(self, name: str) -> None:
        if not self._missing.get(name):
            known = "written before" if name in self._layout else "not in the layout"
            raise ValueError(f"{self.path}: {name}: {known}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with explained(self.path), closing(self._file):
            if error is None:
                self.parts = self._file.finish()
        if error is None and (rest := sorted(n for n, left in self._missing.items() if left)):
            raise ValueError(f"{self.path}: never written: {', '.join(rest)}")


def _header(layout: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and where each tensor starts in it.

    The widest types come first and the header's size is a multiple of 8, so that every tensor is
    aligned to its type, as viewing a mapped file demands.
    """
    spelling = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for name, info in sorted(layout.items(), key=lambda item: -item[1].dtype.itemsize):
        offsets[name], end = end, end + info.nbytes
        entries[name] = {
            "dtype": spelling[info.dtype],
            "shape": info.shape,
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}
