"""What the base image brings and what it lacks, while the training image is built.

    python3 docker/base.py check      ends with an error without the right Python and torch
    python3 docker/base.py missing    prints the pinned packages to install on top

torch and whatever is compiled against it or against CUDA stay the base's: PyPI's builds would not
fit the base's CUDA, Transformer Engine and apex.
"""

import argparse
import importlib.metadata
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = (3, 12)
TORCH = (2, 11)
OF_THE_BASE = re.compile(r"torch|triton|nvidia-.*|cuda-.*|transformer[-_]engine.*|apex")
"""Packages that are never installed over the base's."""
DEVELOPMENT = "# Extra `dev`"
"""Heads the direct dependencies of tests."""
ALSO_NEEDED = ("packaging", "setuptools", "tokenizers")
"""Of those: what torch, transformers and Megatron-Core need as well."""


def main() -> int:
    """Runs one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["check", "missing"])
    if parser.parse_args().command == "check":
        problems = list(base_problems(sys.version_info[:2], installed("torch")))
        print("\n".join(problems) or "the base has Python and torch", file=sys.stderr)
        return 1 if problems else 0
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    print(
        "\n".join(
            f"{name}=={version}" for name, version in pinned(lines) if installed(name) != version
        )
    )
    return 0


def installed(package: str) -> str | None:
    """Its version; None: it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def base_problems(python: tuple[int, int], torch: str | None) -> Iterator[str]:
    """Why this base cannot be built on."""
    if python < PYTHON:
        yield f"the base has Python {_dotted(python)}, expected {_dotted(PYTHON)} or newer"
    if torch is None:
        yield (
            f"the base has no torch, expected {_dotted(TORCH)}; this Dockerfile installs none, as "
            "PyPI's would not fit a GPU image: take a base that brings it (--build-arg BASE_IMAGE)"
        )
    elif tuple(map(int, torch.split(".")[:2])) != TORCH:
        yield f"the base has torch {torch}, expected {_dotted(TORCH)}: take another tag of the base"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def pinned(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(package, version) of what the package needs when it runs and the base need not bring."""
    for section, line in _with_headings(lines):
        name, equals, version = line.partition("==")
        needed = section != DEVELOPMENT or name in ALSO_NEEDED
        if equals and needed and not OF_THE_BASE.fullmatch(name):
            yield name, version


def _with_headings(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(heading, line); a heading is the comment that follows an empty line."""
    heading, previous = "", ""
    for line in lines:
        if line.startswith("#") and not previous:
            heading = line
        elif line and not line.startswith("#"):
            yield heading, line
        previous = line


if __name__ == "__main__":
    sys.exit(main())
