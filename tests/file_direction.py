"""A direction that writes numbered files of known bytes, slowly: what tests do to the engine.

python file_direction.py OUT [num_workers [node_rank num_nodes]]
"""

import errno
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from megatron_dsv3.convert.direct_file import Part
from megatron_dsv3.convert.journal import Written
from megatron_dsv3.convert.memory import Budget
from megatron_dsv3.convert.offline import Share, Unit, convert

PIECE = 1000


@dataclass(frozen=True)
class Files:
    """`num_files` files of ten pieces each."""

    num_files: int = 12
    pause_s: float = 0.0
    """For each piece."""
    trouble: str = ""
    """What happens at file 5."""
    source: str = "a"

    def options(self) -> Mapping[str, Any]:
        return {"source": self.source, "num_files": self.num_files}

    def units(self) -> list[Unit]:
        return [Unit(f"file-{number}", 10 * PIECE) for number in range(self.num_files)]

    def write(
        self, unit: str, path: Path, *, piece_bytes: int, on_bytes: Callable[[int], None]
    ) -> Written:
        number = int(unit.removeprefix("file-"))
        with path.open("wb") as file:
            for piece in range(10):
                file.write(bytes([number, piece]) * (PIECE // 2))
                file.flush()
                on_bytes(PIECE)
                time.sleep(self.pause_s)
                if number == 5 and piece == 5 and self.trouble not in ("", "end"):
                    self._fail()
        content = path.read_bytes()
        half = len(content) // 2
        parts = [
            Part(len(piece), xxhash.xxh3_128_hexdigest(piece))
            for piece in (content[:half], content[half:])
        ]
        return Written(parts, {"number": number, "threads": torch.get_num_threads()})

    def _fail(self) -> None:
        if self.trouble == "full disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.trouble == "killed":
            os.kill(os.getpid(), 9)
        raise {"problem": ValueError, "bug": KeyError}[self.trouble]("file 5 is cursed")

    def finish(self, folder: Path, reports: Mapping[str, Mapping[str, Any]]) -> None:
        if self.trouble == "end":
            raise ValueError("no space for the index")
        numbers = [report["number"] for report in reports.values()]
        (folder / "index").write_text(f"{numbers}")


def main(out: str, num_workers: str = "2", rank: str = "0", num_nodes: str = "1") -> None:
    """Converts with a pause, so that it can be killed on the way."""
    convert(
        Files(pause_s=0.01),
        Path(out),
        budget=Budget(4_000_000_000, int(num_workers)),
        share=Share(int(rank), int(num_nodes)),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
