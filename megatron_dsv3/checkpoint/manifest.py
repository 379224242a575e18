"""What a checkpoint directory must hold: every file's size and hash, written last.

The hash (XXH3, 128 bits) guards against damage, not against an attacker. It runs at tens of GB/s,
so it costs what reading the file costs; each rank hashes what it has written, in its writer.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import xxhash

from megatron_dsv3.config.durable import write_durably

MANIFEST = "manifest.json"
FORMAT = "megatron-dsv3 checkpoint 1"
_PART = "manifest-{rank:05}.part"
_CHUNK = 1 << 22
"""Bytes read at once."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a checkpoint."""

    size: int
    """Bytes."""
    xxh3_128: str


def record_file(path: Path) -> FileRecord:
    """Size and hash of a file, read once from beginning to end."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def write_part(directory: Path, names: Sequence[str], rank: int) -> None:
    """Records the files that one rank has written; `write_manifest` joins the parts."""
    records = {name: asdict(record_file(directory / name)) for name in names}
    write_durably(directory / _PART.format(rank=rank), json.dumps(records))


def write_manifest(directory: Path, known: Mapping[str, FileRecord] = MappingProxyType({})) -> None:
    """Joins the ranks' parts and adds the files that no part names.

    A file of tensors in no part is not taken in: its writer did not come to its end.

    Args:
        directory: The checkpoint.
        known: Files that need not be read again, besides those of the parts.

    Raises:
        ValueError: A file of tensors that no part names and that is not known.
    """
    records: dict[str, dict[str, object]] = {n: asdict(record) for n, record in known.items()}
    parts = sorted(directory.glob(_PART.format(rank=0).replace("00000", "*")))
    for part in parts:
        records.update(json.loads(part.read_text()))
    own = {MANIFEST, *(part.name for part in parts)}
    files = [file.name for file in directory.iterdir() if file.is_file()]
    rest = sorted(name for name in files if name not in records.keys() | own)
    if lost := [name for name in rest if name.endswith(".distcp")]:
        raise ValueError(f"{directory}: the writer of {', '.join(lost)} did not finish")
    records |= {name: asdict(record_file(directory / name)) for name in rest}
    content = {"format": FORMAT, "files": dict(sorted(records.items()))}
    write_durably(directory / MANIFEST, json.dumps(content, indent=1) + "\n")
    for part in parts:
        part.unlink()


def without_files(directory: Path, gone: Sequence[str], changed: Sequence[str]) -> None:
    """Rewrites the manifest after files were taken away or written anew."""
    records = {name: asdict(record) for name, record in read_manifest(directory).items()}
    for name in gone:
        records.pop(name, None)
    records |= {name: asdict(record_file(directory / name)) for name in changed}
    content = {"format": FORMAT, "files": dict(sorted(records.items()))}
    write_durably(directory / MANIFEST, json.dumps(content, indent=1) + "\n")


def read_manifest(directory: Path) -> Mapping[str, FileRecord]:
    """The files that the checkpoint must have.

    Raises:
        ValueError: There is no manifest, or it is not one.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"format is {content['format']!r}, expected {FORMAT!r}")
        return {name: FileRecord(**record) for name, record in content["files"].items()}
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file, so the checkpoint was not finished (what others "
            "wrote has none: compare it with `megatron-dsv3 verify OTHER CHECKPOINT`)"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not the manifest of a checkpoint: {error}") from None


def wrong_sizes(directory: Path, files: Mapping[str, FileRecord]) -> Iterator[str]:
    """Problems that can be seen without reading: files missing, short or long."""
    for name, record in files.items():
        try:
            size = (directory / name).stat().st_size
        except OSError as error:
            yield f"{name} cannot be found: {error.strerror}"
            continue
        if size != record.size:
            yield f"{name} has {size} bytes, expected {record.size}"


def wrong_hashes(directory: Path, files: Mapping[str, FileRecord]) -> Iterator[str]:
    """Problems that only reading shows; `files` may be a share of all."""
    for name, record in files.items():
        try:
            found = record_file(directory / name)
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror}"
            continue
        if found != record:
            yield f"{name} is damaged: hash {found.xxh3_128}, expected {record.xxh3_128}"
