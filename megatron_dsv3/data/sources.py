"""Input files: which there are, what each is, and its rows.

A file's first bytes say what it is: Parquet, gzip, Zstandard; inside, `[` begins a JSON array and
`{` JSONL. Names matter only where a directory is searched.
"""

from __future__ import annotations

import codecs
import glob
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dsv3.data import compressed, json_rows, parquet_rows
from megatron_dsv3.data.manifest import STORE_FILES
from megatron_dsv3.data.rows import Fault, Item, RowError, Table

_KINDS = (".json", ".jsonl", ".ndjson")
_SUFFIXES = (*_KINDS, *(kind + packed for kind in _KINDS for packed in (".gz", ".zst")), ".parquet")

# In every store, finished or not.
_STORE = [name for name in STORE_FILES if name.endswith(".bin")]

# Looked at for the first character; decompressors give no more at once.
_MOST_BLANK_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files that a user's paths stand for."""

    files: tuple[Path, ...]
    ignored: tuple[Path, ...]
    """In the directories named: files whose names are not those of data, hidden ones that are, and
    stores."""


def find_inputs(paths: Sequence[Path | str]) -> Inputs:
    """Files, all data files under directories, and what patterns match; in order of their names.

    Raises:
        ValueError: Nothing there, or a file named twice.
    """
    files: list[Path] = []
    ignored: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = _search(path)
            if not inside.files:
                expected = ", ".join(_SUFFIXES)
                raise ValueError(
                    f"{path}: no data files in it; expected names ending in {expected}"
                )
        else:
            inside = _matches(path)
        files += inside.files
        ignored += inside.ignored
    _check_names(files)
    _check_unique(files)
    return Inputs(tuple(files), tuple(ignored))


def _matches(path: Path) -> Inputs:
    if path.exists():
        return Inputs((path,), ())
    if not glob.has_magic(str(path)):
        raise FileNotFoundError(f"{path}: no such file")
    matches = _once(map(Path, glob.glob(str(path), recursive=True)))
    found = [_search(p) if p.is_dir() else Inputs((p,), ()) for p in matches.values()]
    files = _once(p for inputs in found for p in inputs.files)
    if not files:
        raise FileNotFoundError(f"{path}: no file matches this pattern")
    ignored = _once(p for inputs in found for p in inputs.ignored)
    return Inputs(tuple(files.values()), tuple(ignored[e] for e in ignored if e not in files))


def _once(paths: Iterable[Path]) -> dict[tuple[str, str], Path]:
    """Each entry of a directory by its shortest path, in order of these.

    `**` matches directories and what is in them, and follows a link to its own directory in rounds.
    """
    entries: dict[tuple[str, str], Path] = {}
    for path in sorted(paths, key=lambda path: (len(path.parts), path)):
        entries.setdefault((os.path.realpath(path.parent), path.name), path)
    return dict(sorted(entries.items(), key=lambda entry: entry[1]))


def _search(root: Path) -> Inputs:
    """The data files under a directory, and what else one might have meant by it.

    Links are followed. Stores are left out: their manifests and reports are JSON, too.
    """
    files: list[Path] = []
    ignored: list[Path] = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, onerror=_raise, followlinks=True):
        folders.sort()
        real = os.path.realpath(folder)
        if real in seen or {*_STORE} <= {*names}:
            ignored += [] if real in seen else [Path(folder)]
            folders.clear()
            continue
        seen.add(real)
        for path in (Path(folder, name) for name in names):
            is_data = path.name.lower().endswith(_SUFFIXES)
            if _is_hidden(path, root):
                ignored += [path] if is_data else []
            else:
                (files if is_data else ignored).append(path)
    if missing := [path for path in files if not path.is_file()]:
        raise FileNotFoundError(f"{missing[0]}: no file, or a link to nothing")
    return Inputs(tuple(sorted(files)), tuple(sorted(ignored)))


def _raise(error: OSError) -> None:
    raise error


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.relative_to(root).parts)


def _check_names(files: Iterable[Path]) -> None:
    """Names go into the store and its report, which are UTF-8."""
    for path in files:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{str(path)!a}: the name is not UTF-8; rename it") from None


def _check_unique(files: Iterable[Path]) -> None:
    seen: dict[Path, Path] = {}
    for path in files:
        other = seen.setdefault(path.resolve(), path)
        if other is not path:
            raise ValueError(
                f"{path}: named twice (the other time as {other}); its rows would count double. "
                "Copy the file, if this is meant"
            )


class Source:
    """One file being read."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
        if not path.is_file():
            # A pipe can be read once; its first bytes and its hash would be missed.
            kind = "a directory" if path.is_dir() else "a pipe or a device"
            raise ValueError(f"{path}: expected a file of rows, got {kind}")
        self.path = path
        self.size = path.stat().st_size
        self.kind = "empty"
        """What it was found to be: `json`, `jsonl+gzip`, `parquet`."""
        self.sha256 = ""
        """Of the file; known once all items were taken."""
        self.num_read = 0
        """Bytes of the file behind the items taken so far, about."""

    def items(self) -> Iterator[Item]:
        """All there is in the file, in order; at the end at most one fault of the whole file."""
        with self.path.open("rb", buffering=0) as file:
            packed = compressed.CountedFile(file)
            head = file.read(4)
            file.seek(0)
            found = False
            try:
                for item in self._items(packed, head):
                    found = True
                    self.num_read = (
                        int(self.size * item.share) if isinstance(item, Table) else packed.num_bytes
                    )
                    yield item
            except RowError as error:
                found = True
                yield Fault(error.reason, str(error), ends_file=True)
            if not found:
                problem = f"{self.path}: no rows in it; expected at least one object with messages"
                yield Fault("empty file", problem, ends_file=True)
            self.sha256 = packed.sha256()
            self.num_read = self.size

    def _items(self, packed: compressed.CountedFile, head: bytes) -> Iterator[Item]:
        if head == parquet_rows.MAGIC:
            self.kind = "parquet"
            return parquet_rows.tables(self.path)
        text, packing = compressed.unpack(packed, head, str(self.path))
        start, first = _begin(text, str(self.path))
        if first == b"":
            return iter(())
        self.kind = "json" if first == b"[" else "jsonl"
        self.kind += f"+{packing}" if packing else ""
        read = json_rows.array_rows if first == b"[" else json_rows.lines
        return read(text, str(self.path), start)


def _begin(text: io.BufferedReader, path: str) -> tuple[int, bytes]:
    """Moves past a byte order mark; the position, and the first byte that is no space or none."""
    head = text.peek(compressed.BUFFER_BYTES)
    start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    text.read(start)
    first = head[start:].lstrip()[:1]
    blank = not first and len(head) >= _MOST_BLANK_BYTES
    if blank or first not in (b"", b"[", b"{"):
        found = f"{len(head)} bytes of space" if blank else repr(first)
        raise RowError(
            "unknown kind of file",
            f"{path}: expected a JSON array, JSONL or Parquet, got {found} at its start",
        )
    return start, first
