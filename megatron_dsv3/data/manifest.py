"""What a store says of itself: how it was made, and its files."""

from pathlib import Path
from typing import Literal

from pydantic import JsonValue, ValidationError

from megatron_dsv3.config.section import Section, problem_lines

MANIFEST = "manifest.json"
STORE_FILES = tuple(
    f"{name}.{kind}" for name in ("tokens", "spans", "ids") for kind in ("bin", "idx")
)


class Source(Section):
    """A file that samples came from."""

    path: str
    size: int
    """Bytes, as stored (compressed, where it is)."""
    sha256: str


class Recipe(Section):
    """All that decides which tokens a store holds; equal recipes give equal stores."""

    tokenizer: str
    """Fingerprint: see `fingerprints.tokenizer_fingerprint`."""
    template: str
    """Its name."""
    template_fingerprint: str
    options: dict[str, JsonValue]
    sources: tuple[Source, ...]


class FileRecord(Section):
    """A file of a store."""

    size: int
    sha256: str


class Manifest(Section):
    """What `manifest.json` says."""

    format: Literal["megatron-dsv3 store 1"] = "megatron-dsv3 store 1"
    recipe: Recipe
    num_samples: int
    num_tokens: int
    num_counted: int
    """Tokens inside loss spans."""
    longest: int
    """Tokens of the longest sample."""
    files: dict[str, FileRecord]


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a complete store; None: there is no store, or it is incomplete.

    Raises:
        ValueError: There is a manifest, but it or the files do not fit together.
    """
    path = directory / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        problems = "; ".join(f"{name}: {text}" for name, text in problem_lines(error, Manifest))
        raise ValueError(f"{path}: not the manifest of a store: {problems}") from None
    if set(manifest.files) != set(STORE_FILES):
        raise broken(directory, f"lists {', '.join(sorted(manifest.files))}")
    for name, record in manifest.files.items():
        file = directory / name
        size = file.stat().st_size if file.is_file() else None
        if size != record.size:
            found = "is missing" if size is None else f"has {size} bytes"
            raise broken(directory, f"gives {name} {record.size} bytes, but it {found}")
    return manifest


def broken(directory: Path, problem: str) -> ValueError:
    """The error of a store whose manifest and files do not fit together."""
    return ValueError(
        f"{directory}: {MANIFEST} {problem}; copy the store again, or prepare it anew"
    )
