"""What a conversion has finished, kept beside its files, so that a killed one can go on.

    OUT.tmp/                 grows until everything is there, then becomes OUT
      .journal/options.json  what is converted and how; another conversion is refused
      .journal/FILE.json     one for each finished file: size, hash, and what the writer reports

Each entry appears by a rename, after its file was synced. Processes on any number of machines share
the directory and nothing else.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import xxhash

from megatron_dsv3.config.durable import sync, write_synced
from megatron_dsv3.convert.direct_file import Part, combined
from megatron_dsv3.convert.hf_io import check_target
from megatron_dsv3.convert.safetensors_file import explained

_JOURNAL = ".journal"
_READ_BYTES = 4_000_000
Report = Mapping[str, Any]
"""What the writer of a file leaves for the end of the conversion, as JSON."""


@dataclass(frozen=True, slots=True)
class Written:
    """What the writer of a file gives back."""

    parts: Sequence[Part]
    """All its bytes, in order."""
    report: Report


@dataclass(frozen=True, slots=True)
class Entry:
    """A finished file."""

    size: int
    xxh3: str
    """`direct_file.combined` of the parts."""
    part_bytes: Sequence[int]
    report: Report

    @classmethod
    def of(cls, written: Written) -> Self:
        """The file that was written."""
        sizes = [part.num_bytes for part in written.parts]
        return cls(sum(sizes), combined(written.parts), sizes, written.report)


class Journal:
    """The journal of one target directory."""

    def __init__(self, out: Path, options: Mapping[str, Any]) -> None:
        """Opens or starts it.

        Args:
            out: The target.
            options: What the result depends on, as JSON.

        Raises:
            ValueError: The target, or what stands under its temporary name, is not this
                conversion's.
        """
        self.out = Path(os.path.realpath(out))
        self.staging = _staging(self.out)
        self._folder = self.staging / _JOURNAL
        self._options = json.loads(json.dumps(options))
        self._reopen()
        check_place(out)
        with explained(self.staging):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._claim()

    def _reopen(self) -> None:
        """Takes back a target that was killed with its name, but before its journal was gone."""
        ended = self.out / _JOURNAL / "options.json"
        if ended.is_file() and not self.staging.exists():
            self._compare(ended)
            with explained(self.staging):
                self.out.replace(self.staging)

    def _claim(self) -> None:
        path = self._folder / "options.json"
        draft = self._folder / f".options.{os.uname().nodename}.{os.getpid()}"
        write_synced(draft, json.dumps(self._options, indent=2).encode())
        try:
            # Unlike a rename it fails where another process came first.
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
        self._compare(path)

    def _compare(self, path: Path) -> None:
        """Raises ValueError unless the options there are this conversion's."""
        options, found = self._options, _read_json(path)
        differing = sorted(
            name for name in options.keys() | found.keys() if options.get(name) != found.get(name)
        )
        if differing:
            raise ValueError(
                f"{path.parent.parent}: belongs to another conversion, which differs in "
                f"{', '.join(differing)}; finish that one, delete the directory or choose another"
            )

    def draft(self, name: str) -> Path:
        """Where this process writes a file until it is finished."""
        return self.staging / f"{name}.{os.uname().nodename}.{os.getpid()}.part"

    def remove_drafts(self) -> None:
        """Removes what killed processes of this machine left: a file of 5 GB for each of them."""
        machine = re.escape(os.uname().nodename)
        for path in self.staging.glob("*.part"):
            match = re.search(rf"\.{machine}\.(\d+)\.part$", path.name)
            if match is not None and not _runs(int(match[1])):
                path.unlink(missing_ok=True)

    def entry(self, name: str) -> Entry | None:
        """What is known of a file; None: it is not finished. The file itself is not looked at."""
        try:
            return Entry(**_read_json(self._folder / f"{name}.json"))
        except FileNotFoundError:
            return None

    def is_whole(self, name: str, *, on_bytes: Callable[[int], None]) -> bool:
        """Reads a finished file again and compares size and hash."""
        entry, path = self.entry(name), self.staging / name
        if entry is None or not path.is_file() or path.stat().st_size != entry.size:
            return False
        return combined(read_parts(path, entry.part_bytes, on_bytes)) == entry.xxh3

    def record(self, name: str, entry: Entry) -> None:
        """Notes that a file is finished; it has been synced before."""
        draft = self._folder / f"{name}.{os.uname().nodename}.{os.getpid()}.part"
        with explained(draft):
            write_synced(draft, json.dumps(asdict(entry)).encode())
            draft.replace(self._folder / f"{name}.json")

    def claim_end(self, *, force: bool = False) -> bool:
        """Whether this process completes the target: the first one that asks, or any by force."""
        try:
            (self._folder / "ending").open("x").close()
        except FileExistsError:
            return force
        # Another node has done it meanwhile.
        except FileNotFoundError:
            return False
        return True

    def release_end(self) -> None:
        """Undoes `claim_end`."""
        (self._folder / "ending").unlink(missing_ok=True)

    def discard(self) -> None:
        """Removes the temporary directory."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def close(self) -> None:
        """Makes the target of the temporary directory."""
        with explained(self.out):
            self.staging.replace(self.out)
            sync(self.out.parent)
            # Last: without it nobody could go on after a kill at this point.
            shutil.rmtree(self.out / _JOURNAL)


def check_place(out: Path) -> None:
    """Whether a conversion can begin or go on there; ask before minutes of reading its source.

    Raises:
        ValueError: Something else is there.
    """
    target = Path(os.path.realpath(out))
    if (_staging(target) / _JOURNAL).is_dir():
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(f"{target}: exists and is not an empty directory; choose another one")
    elif not (target / _JOURNAL).is_dir():  # else killed at its very end
        check_target(target)


def _staging(target: Path) -> Path:
    return target.with_name(target.name + ".tmp")


def read_parts(
    path: Path, part_bytes: Sequence[int], on_bytes: Callable[[int], None]
) -> list[Part]:
    """Hashes a file's parts. XXH3 (128 bits) finds accidents at ten times the speed of a disk."""
    buffer = memoryview(bytearray(_READ_BYTES))
    parts = []
    with path.open("rb", buffering=0) as file:
        for num_bytes in part_bytes:
            digest, rest = xxhash.xxh3_128(), num_bytes
            while rest and (count := file.readinto(buffer[: min(rest, _READ_BYTES)])):
                digest.update(buffer[:count])
                rest -= count
                on_bytes(count)
            parts.append(Part(num_bytes, digest.hexdigest()))
    return parts


def _runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: damaged ({error}); delete the directory and start again"
        ) from None
