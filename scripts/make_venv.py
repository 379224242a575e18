"""Makes the virtual environment that `make` works in, unless it is there and right.

Usage: make_venv.py DIR, run by the Python that the environment is to be made from. Standard library
only. `DIR/megatron-dsv3.stamp` holds two lines:

    a hash of setup.py, constraints.txt, the Python version and DIR; "unfinished" until it is true
    the checkout that the package is installed from

The stamp is written before the first file and completed after the last, so that an installation
which was killed is seen as such. It is made anew then, not repaired: pip takes a half-written
package for an installed one.

The package itself is installed in editable form, once, for the `megatron-dsv3` command and the
metadata. Both follow from setup.py alone, which the hash covers, so one environment outside (CI's
cache) may serve many checkouts that come and go: `make` puts the one at hand first on PYTHONPATH,
which wins over the editable link. A link whose checkout is gone is set anew.
"""

import argparse
import fcntl
import hashlib
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ("setup.py", "constraints.txt")
STAMP = "megatron-dsv3.stamp"
UNFINISHED = "unfinished"
NEEDED_GB = 7
"""Free space for a fresh environment (5.2 GB), with room for pip's unpacking."""


def main() -> int:
    """Exits with 2 where the user has to change something, with 1 where an installation failed."""
    parser = argparse.ArgumentParser(description="Make the virtual environment unless it is right")
    parser.add_argument("folder", type=Path, help="where the environment is or will be")
    folder = parser.parse_args().folder.resolve()
    try:
        with locked(folder):
            ensure(folder)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        failed = " ".join(map(str, error.cmd))
        print(
            f"{folder}: exit code {error.returncode} from `{failed}`, for the reason above; "
            "the next `make venv` starts afresh",
            file=sys.stderr,
        )
        return 1
    return 0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time have `folder`; the lock ends with the process, killed or not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ensure(folder: Path) -> None:
    """Keeps what fits the requirements, links anew where the checkout is gone, builds the rest."""
    key = requirements_key(folder)
    stamped_key, checkout = read_stamp(folder)
    if stamped_key != key or not python_runs(folder):
        build(folder, key)
    elif not Path(checkout, "setup.py").is_file():
        pip_install(folder, "--no-deps", "--no-build-isolation", "-e", ".")
        write_stamp(folder, key)
        print(f"{folder}: now of {ROOT}, as {checkout} is gone", flush=True)
    else:
        print(f"{folder}: fits setup.py and constraints.txt", flush=True)


def requirements_key(folder: Path) -> str:
    """Changes with all that makes an environment wrong; its scripts hold its own path."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {folder}".encode())
    for name in REQUIREMENTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def read_stamp(folder: Path) -> tuple[str, str]:
    """The key and the checkout that `write_stamp` left, empty where there is no stamp."""
    stamp = folder / STAMP
    lines = stamp.read_text().splitlines() if stamp.is_file() else []
    return (lines[0], lines[1]) if len(lines) == 2 else ("", "")


def write_stamp(folder: Path, key: str) -> None:
    """Marks the folder as ours; it counts as installed only with the key that is asked for."""
    (folder / STAMP).write_text(f"{key}\n{ROOT}\n")


def python_runs(folder: Path) -> bool:
    """Whether the interpreter behind the environment is still there."""
    try:
        return subprocess.run([folder / "bin/python", "-I", "-c", ""], check=False).returncode == 0
    except OSError:
        return False


def build(folder: Path, key: str) -> None:
    """Makes the environment from nothing; refuses a folder that holds anything else."""
    if folder.exists() and not (folder / STAMP).is_file() and not is_empty_folder(folder):
        raise ValueError(
            f"VENV={folder}: expected a new folder or one made by `make venv`, got one that holds "
            "something else, which stays as it is; choose another VENV or delete it"
        )
    clear(folder)
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < NEEDED_GB:
        raise ValueError(
            f"VENV={folder}: expected {NEEDED_GB} GB of free disk space, got {free_gb:.1f} GB; "
            "free some or choose a VENV on another disk"
        )
    version = sys.version.split()[0]
    # Flushed, as pip writes to the same place.
    print(f"{folder}: installing with Python {version}; 5 GB, some minutes", flush=True)
    start = time.monotonic()
    venv.EnvBuilder(with_pip=True, symlinks=True).create(folder)
    pip_install(folder, "-c", "constraints.txt", "-e", ".[dev]")
    write_stamp(folder, key)
    print(f"{folder}: installed in {time.monotonic() - start:.0f} s", flush=True)


def clear(folder: Path) -> None:
    """Empties the folder but for its stamp, which says at any moment that it is ours and unfit."""
    folder.mkdir(exist_ok=True)
    write_stamp(folder, UNFINISHED)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != STAMP:
            path.unlink()


def is_empty_folder(path: Path) -> bool:
    """Whether `path` is a folder, rather than a file, with nothing in it."""
    return path.is_dir() and not any(path.iterdir())


def pip_install(folder: Path, *arguments: str) -> None:
    """Runs the environment's own pip in this checkout."""
    # -I: what lies on PYTHONPATH or in the user's site-packages does not count as installed.
    pip = [str(folder / "bin/python"), "-I", "-m", "pip", "--disable-pip-version-check"]
    # Only errors in a log; on a terminal a long download shows that it moves.
    quiet = [] if sys.stdout.isatty() else ["-qq"]
    subprocess.run([*pip, "install", *quiet, *arguments], cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main())
