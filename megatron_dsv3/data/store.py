"""Tokenised samples on disk: what `prepare` writes and the trainer packs.

A store is a directory of three of Megatron-Core's indexed datasets, one sequence a sample in each,
and a manifest:

    tokens.bin, tokens.idx   token ids, int32
    spans.bin, spans.idx     bounds of the counted stretches: start, end, start, end ..., int32
    ids.bin, ids.idx         where the sample came from, UTF-8
    manifest.json            how the store was made, size and SHA-256 of the other files

It is written beside its final name and renamed; the manifest is written last. So a directory
without a manifest is incomplete, whatever stopped its writer, and the next writer replaces it.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from megatron_dsv3.config.durable import sync
from megatron_dsv3.data.manifest import (
    MANIFEST,
    STORE_FILES,
    FileRecord,
    Manifest,
    Recipe,
    broken,
    read_manifest,
)

Tokens = npt.NDArray[np.int32]
Spans = npt.NDArray[np.int32]
"""[k, 2], int32: start and end, end exclusive, of the tokens that count; ascending and apart."""

_TYPES: dict[str, type[np.number[Any]]] = {"tokens": np.int32, "spans": np.int32, "ids": np.uint8}
REPORT = "report"
"""Directory inside a store for what `prepare` says about it; no part of the store."""
_LOCK = "lock"
_DTYPE_CODES: dict[type[np.number[Any]], int] = {np.uint8: 1, np.int32: 4}
"""Megatron-Core's own (`indexed_dataset.DType`)."""
_POINTERS_PER_WRITE = 1 << 20


@dataclass(frozen=True, slots=True)
class Sample:
    """One document to train on. tokens: [n], int32; loss: [n], True where a token is a target."""

    id: str
    """`file:row`, and `#turn` where a row gave several samples."""
    tokens: Tokens
    loss: npt.NDArray[np.bool_]


class Store:
    """A complete store, read by memory map; samples are numbered in the order of their sources."""

    def __init__(self, directory: Path) -> None:
        """Opens it.

        Raises:
            ValueError: There is none, or its files don't fit its manifest.
        """
        # Megatron-Core takes seconds to import, and writers need nothing of it.
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        manifest = read_manifest(directory)
        if manifest is None:
            state = "the store is incomplete" if directory.is_dir() else "no such directory"
            raise ValueError(
                f"{directory}: {state} (no {MANIFEST}); write it with `megatron-dsv3 prepare`"
            )
        self.directory, self.manifest = directory, manifest
        self._tokens, self._spans, self._ids = (
            IndexedDataset(str(directory / name)) for name in _TYPES
        )
        for name, part in (("tokens", self._tokens), ("spans", self._spans), ("ids", self._ids)):
            if len(part) != manifest.num_samples:
                raise broken(
                    directory,
                    f"gives {manifest.num_samples} samples, but {name}.idx has {len(part)}",
                )

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __iter__(self) -> Iterator[Sample]:
        return (self.sample(index) for index in range(len(self)))

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """[samples], int32: tokens of each, from the index alone."""
        lengths: npt.NDArray[np.int32] = self._tokens.sequence_lengths
        return lengths

    def tokens(self, index: int) -> Tokens:
        """[n], int32; a view of the file, not to be written."""
        tokens: Tokens = self._tokens[index]
        return tokens

    def spans(self, index: int) -> Spans:
        """[k, 2], int32; a view of the file."""
        spans: Spans = self._spans[index]
        return spans.reshape(-1, 2)

    def id(self, index: int) -> str:
        """Where the sample came from."""
        return bytes(self._ids[index]).decode()

    def sample(self, index: int) -> Sample:
        """All of one sample, as arrays of its own."""
        tokens = self.tokens(index).copy()
        return Sample(self.id(index), tokens, mask_of(self.spans(index), len(tokens)))

    def check_hashes(self) -> None:
        """Reads every file whole.

        Raises:
            ValueError: One has other bytes than were written.
        """
        for name, record in self.manifest.files.items():
            with (self.directory / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != record.sha256:
                raise broken(
                    self.directory, f"gives {name} the hash {record.sha256}, but it has {found}"
                )


def mask_of(spans: Spans, num_tokens: int) -> npt.NDArray[np.bool_]:
    """[num_tokens], True inside the spans."""
    # +1 where a span starts and -1 where it ends: their running sum is 1 inside.
    steps = np.zeros(num_tokens + 1, np.int8)
    np.add.at(steps, spans[:, 0], 1)
    np.add.at(steps, spans[:, 1], -1)
    return np.cumsum(steps[:-1], dtype=np.int8).astype(np.bool_)


def spans_of(loss: npt.NDArray[np.bool_]) -> Spans:
    """The stretches of True, the inverse of `mask_of`."""
    edges = np.diff(loss.astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(edges).astype(np.int32).reshape(-1, 2)


# ---- Writing ------------------------------------------------------------------------------------


class StoreWriter:
    """Writes a store in one pass, 12 bytes of memory a sample.

    As a context manager it removes what an error leaves unfinished. What a kill leaves, the next
    writer of the same name removes.
    """

    def __init__(self, directory: Path, *, replace: bool = False) -> None:
        """Begins beside `directory`, which stays as it is until `finish`.

        Args:
            directory: Where the store will be.
            replace: Whether a complete store there may be replaced; an incomplete one always is.

        Raises:
            ValueError: Something else is there, or another process writes the same store.
        """
        _check_target(directory, replace=replace)
        self.directory = directory
        self._unfinished = directory.with_name(f"{directory.name}.unfinished")
        self._lock = _take(self._unfinished)
        for name in (*STORE_FILES, MANIFEST):
            (self._unfinished / name).unlink(missing_ok=True)
        shutil.rmtree(self.report_directory, ignore_errors=True)
        self._parts = {
            name: _Part(self._unfinished / name, dtype) for name, dtype in _TYPES.items()
        }
        self.num_samples = self.num_tokens = self.num_counted = self.longest = 0

    @property
    def report_directory(self) -> Path:
        """Where a report may be put before `finish`."""
        return self._unfinished / REPORT

    def add(self, sample_id: str, tokens: Tokens, loss_spans: Spans) -> None:
        """Appends a sample.

        Raises:
            ValueError: The spans are not ascending, apart, and inside the tokens.
        """
        bounds = loss_spans.reshape(-1)
        if not _is_ascending(bounds, len(tokens)):
            raise ValueError(
                f"{sample_id}: loss spans must ascend within {len(tokens)} tokens, "
                f"got {loss_spans.tolist()}"
            )
        self._parts["tokens"].append(tokens)
        self._parts["spans"].append(bounds)
        self._parts["ids"].append(np.frombuffer(sample_id.encode(), np.uint8))
        self.num_samples += 1
        self.num_tokens += len(tokens)
        self.num_counted += int(bounds[1::2].sum() - bounds[::2].sum())
        self.longest = max(self.longest, len(tokens))

    def finish(self, recipe: Recipe) -> Manifest:
        """Completes the store and puts it in its place.

        Raises:
            ValueError: It holds no counted token.
        """
        if not self.num_counted:
            raise ValueError(f"{self.directory}: no counted token in {self.num_samples} samples")
        files: dict[str, FileRecord] = {}
        for name, part in self._parts.items():
            files |= part.finish(name)
        manifest = Manifest(
            recipe=recipe,
            num_samples=self.num_samples,
            num_tokens=self.num_tokens,
            num_counted=self.num_counted,
            longest=self.longest,
            files=files,
        )
        with (self._unfinished / MANIFEST).open("w", encoding="utf-8") as file:
            file.write(manifest.model_dump_json(indent=2) + "\n")
            _sync(file)
        _put_in_place(self._unfinished, self.directory)
        self._lock.close()
        return manifest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if self._lock.closed:
            return
        for part in self._parts.values():
            # On a full disk what is buffered cannot be written either; it is removed anyway.
            with contextlib.suppress(OSError):
                part.file.close()
        shutil.rmtree(self._unfinished)
        self._lock.close()


def _is_ascending(bounds: Spans, num_tokens: int) -> bool:
    """Whether 0 <= start < end < start < end ... <= num_tokens; spans that touch are one span."""
    if not len(bounds):
        return True
    rises = bool((bounds[1:] > bounds[:-1]).all())
    return rises and len(bounds) % 2 == 0 and bounds[0] >= 0 and bool(bounds[-1] <= num_tokens)


def _check_target(directory: Path, *, replace: bool) -> None:
    if directory.name in ("", ".."):
        raise ValueError(
            f"{directory}: expected a name for the store, such as {directory / 'store'}"
        )
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ValueError(f"{directory}: is a file; expected a directory for the store, or nothing")
    found = {path.name for path in directory.iterdir()}
    if strange := sorted(found - {*STORE_FILES, MANIFEST, REPORT, _LOCK}):
        raise ValueError(
            f"{directory}: holds {', '.join(strange[:3])}, which belong to no store; "
            "name another directory"
        )
    if MANIFEST in found and not replace:
        raise ValueError(f"{directory}: holds a complete store already; name another directory")


def _take(directory: Path) -> IO[bytes]:
    """Makes the directory this process's own; the lock goes when the process does."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = (directory / _LOCK).open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ValueError(
            f"{directory}: another process is writing this store; wait for it, or end it"
        ) from None
    return lock


def _put_in_place(unfinished: Path, directory: Path) -> None:
    """A rename replaces no directory that holds something, so what is there moves aside first."""
    replaced = directory.with_name(f"{directory.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if directory.exists():
        directory.rename(replaced)
    unfinished.rename(directory)
    # Not before: a writer that came in between would take the directory for its own and empty it.
    (directory / _LOCK).unlink()
    shutil.rmtree(replaced, ignore_errors=True)
    sync(directory.parent)


class _Part:
    """Writes one indexed dataset.

    Not Megatron-Core's builder, which keeps lists of Python integers (100 bytes a sample in all)
    and takes torch tensors.
    """

    def __init__(self, prefix: Path, dtype: type[np.number[Any]]) -> None:
        self.prefix, self.dtype = prefix, dtype
        self.file = prefix.with_suffix(".bin").open("wb")
        self.hash = hashlib.sha256()
        self.lengths = array("i")

    def append(self, sequence: npt.NDArray[Any]) -> None:
        content = np.ascontiguousarray(sequence, self.dtype).data
        self.file.write(content)
        self.hash.update(content)
        self.lengths.append(len(sequence))

    def finish(self, name: str) -> dict[str, FileRecord]:
        size = self.file.tell()
        _sync(self.file)
        self.file.close()
        with self.prefix.with_suffix(".idx").open("w+b") as index:
            self._write_index(index)
            _sync(index)
            index_size = index.tell()
            index.seek(0)
            digest = hashlib.file_digest(index, "sha256")
        return {
            f"{name}.bin": FileRecord(size=size, sha256=self.hash.hexdigest()),
            f"{name}.idx": FileRecord(size=index_size, sha256=digest.hexdigest()),
        }

    def _write_index(self, index: IO[bytes]) -> None:
        """Header, lengths, byte offsets, and the bounds of documents: each sequence is one."""
        lengths = np.frombuffer(self.lengths, np.int32)
        count = len(lengths)
        index.write(b"MMIDIDX\x00\x00")
        index.write(struct.pack("<QBQQ", 1, _DTYPE_CODES[self.dtype], count, count + 1))
        index.write(lengths.data)
        offset = 0
        for start in range(0, count, _POINTERS_PER_WRITE):
            ends = lengths[start : start + _POINTERS_PER_WRITE].cumsum(dtype=np.int64)
            ends = ends * np.dtype(self.dtype).itemsize + offset
            index.write(np.concatenate([[offset], ends[:-1]]).astype(np.int64).data)
            offset = int(ends[-1])
        for start in range(0, count + 1, _POINTERS_PER_WRITE):
            stop = min(start + _POINTERS_PER_WRITE, count + 1)
            index.write(np.arange(start, stop, dtype=np.int64).data)


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
