"""Input files as streams of bytes: plain, gzip or Zstandard, counted, hashed and bounded.

A small file can hold petabytes of zeros. A stream that unpacks to far more than text ever does
(`MAX_RATIO` of what was read, once past `FREE_BYTES`), or to more than `MAX_BYTES`, is refused
while it is being read, so neither memory nor disk fills up.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Buffer, Callable
from typing import Any, BinaryIO, cast

import pyarrow as pa

from megatron_dsv3.data.rows import RowError

MAX_RATIO = 250
"""Chats compress 2 to 10 times, the same chat over and over about 100 times with gzip."""
FREE_BYTES = 1 << 24
"""Unpacked before the ratio is looked at: a short file may be one long repetition."""
MAX_BYTES = 1 << 40
"""Unpacked from one file."""
BUFFER_BYTES = 1 << 20
_PIECE_BYTES = 1 << 16


def _open_gzip(file: BinaryIO) -> Any:
    return gzip.GzipFile(fileobj=file, mode="rb")


def _open_zstd(file: BinaryIO) -> Any:
    return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")


_MAGIC: dict[bytes, tuple[str, Callable[[BinaryIO], Any]]] = {
    b"\x1f\x8b": ("gzip", _open_gzip),
    b"\x28\xb5\x2f\xfd": ("zstd", _open_zstd),
    # Frames to be skipped, with which pzstd begins a file.
    **{bytes([0x50 + i]) + b"\x2a\x4d\x18": ("zstd", _open_zstd) for i in range(16)},
}
_DAMAGE = (EOFError, OSError, zlib.error)


class CountedFile(io.RawIOBase):
    """A file as it lies on disk: knows how much of it was read, and the hash of that."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.num_bytes = 0
        self._sha256 = hashlib.sha256()

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Buffer) -> int:
        """Fills the buffer as far as the file goes."""
        view = memoryview(buffer)
        count: int = self.file.readinto(view)  # type: ignore[attr-defined]
        self._sha256.update(view[:count])
        self.num_bytes += count
        return count

    def sha256(self) -> str:
        """Of the whole file; what was left unread is read."""
        while self.read(BUFFER_BYTES):
            continue
        return self._sha256.hexdigest()


class _Bounded(io.RawIOBase):
    """What a decompressor gives, within bounds; its errors as those of a row."""

    def __init__(self, packed: CountedFile, open_: Callable[[BinaryIO], Any], path: str) -> None:
        self.packed = packed
        self.path = path
        self.num_bytes = 0
        # Big reads of the disk: the decompressors ask for little at a time.
        self._stream = open_(cast("BinaryIO", io.BufferedReader(packed, BUFFER_BYTES)))

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Buffer) -> int:
        """Some bytes, 0 at the end."""
        view = memoryview(buffer)
        try:
            # Not readinto, and little at a time: what came before a damaged place is not lost.
            content = self._stream.read1(min(len(view), _PIECE_BYTES))
        except _DAMAGE as error:
            cut = isinstance(error, EOFError) or "Truncated" in str(error)  # Arrow's word
            raise RowError(
                "file cut off" if cut else "damaged compression",
                f"{self.path}: the compressed data {'end too early' if cut else 'are damaged'} "
                f"(after {self.num_bytes} bytes of text, {self.packed.num_bytes} of the file): "
                f"{error}",
            ) from None
        view[: len(content)] = content
        self.num_bytes += len(content)
        self._check()
        return len(content)

    def _check(self) -> None:
        read = max(1, self.packed.num_bytes)
        bound = min(MAX_BYTES, max(FREE_BYTES, MAX_RATIO * read))
        if self.num_bytes > bound:
            raise RowError(
                "decompression bomb",
                f"{self.path}: {self.num_bytes} bytes came out of {read}; expected at most "
                f"{MAX_RATIO} times as many and {MAX_BYTES} in all. If this is no bomb, "
                "decompress the file first",
            )


def unpack(packed: CountedFile, head: bytes, path: str) -> tuple[io.BufferedReader, str]:
    """The text of a file that begins with `head`, and what it is compressed with, or ""."""
    for magic, (name, open_) in _MAGIC.items():
        if head.startswith(magic):
            return io.BufferedReader(_Bounded(packed, open_, path), BUFFER_BYTES), name
    return io.BufferedReader(packed, BUFFER_BYTES), ""
