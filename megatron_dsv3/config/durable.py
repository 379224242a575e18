"""Files and names that outlast a power cut."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Brings a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes) -> None:
    """Writes a small file that is on the disk when this returns."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_durably(path: Path, text: str) -> None:
    """Writes a small file whole or not at all, and on the disk before its name is."""
    beside = path.with_name(path.name + ".tmp")
    write_synced(beside, text.encode())
    beside.replace(path)
    sync(path.parent)
