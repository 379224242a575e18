"""`megatron-dsv3 examples`: examples/ and tools/ of this version as files that can be changed."""

import shutil
from pathlib import Path

FOLDERS = ("examples", "tools")
PACKAGE = Path(__file__).resolve().parents[1]


def run(out: Path) -> list[Path]:
    """Copies them into `out`, where they work as in a checkout; returns what is there then.

    Raises:
        ValueError: `out` holds something, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not an empty directory; give another --out")
    source = home()
    try:
        for name in FOLDERS:
            shutil.copytree(
                source / name, out / name, ignore=shutil.ignore_patterns("__pycache__", ".*")
            )
    except OSError as error:
        raise ValueError(
            f"{out}: cannot be written ({error.strerror or error}); give another --out"
        ) from None
    return sorted(path for path in out.rglob("*") if path.is_file())


def home() -> Path:
    """Where they are: an installed package has them inside (setup.py), a checkout beside it."""
    inside = PACKAGE / "_files"
    return inside if inside.is_dir() else PACKAGE.parent
