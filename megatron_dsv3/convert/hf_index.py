"""Which file of a checkpoint directory holds which tensor: index and headers, cross-checked.

Everything that can be wrong with a directory without knowing the model is found here.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import torch

from megatron_dsv3.convert.fp8 import SCALE_SUFFIX, scale_shape
from megatron_dsv3.convert.safetensors_file import TensorInfo, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_LISTED = 20


def stored_tensors(directory: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """Every tensor of a checkpoint, FP8 scales among them: its file, and what the header says.

    Raises:
        ValueError: The directory does not hold one complete checkpoint.
    """
    index = _read_index(directory)
    files = sorted(set(index.values())) if index else [SINGLE]
    _refuse(directory, _file_problems(directory, files))
    headers = {file: read_header(directory / file) for file in files}
    if index:
        _refuse(directory, _index_problems(index, headers))
    stored: dict[str, tuple[Path, TensorInfo]] = {}
    for file, header in headers.items():
        path = directory / file
        stored |= {name: (path, info) for name, info in header.items()}
    _refuse(directory, _fp8_problems({name: info for name, (_, info) in stored.items()}))
    return stored


def listed(what: str, names: Sequence[str]) -> str:
    """Counts and names things, the first 20 of them."""
    more = ", ..." if len(names) > _MAX_LISTED else ""
    return f"{len(names)} {what}: {', '.join(names[:_MAX_LISTED])}{more}"


def _read_index(directory: Path) -> dict[str, str] | None:
    """{tensor: file}; None: no index, the checkpoint is one file."""
    path = directory / INDEX
    if not path.exists():
        if (directory / SINGLE).exists():
            return None
        raise ValueError(f"{directory}: expected a checkpoint with {INDEX} or {SINGLE}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        index: dict[str, str] = dict(content["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an index of safetensors ({error!r})") from None
    if not index or not all(isinstance(file, str) for file in index.values()):
        raise ValueError(f"{path}: expected weight_map to give a file for each tensor")
    return index


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(listed("named twice", sorted({n for n in names if names.count(n) > 1})))
    return content


def _file_problems(directory: Path, files: Sequence[str]) -> dict[str, list[str]]:
    # Judged by the name: links to elsewhere are what Hugging Face's own cache is made of.
    outside = [f for f in files if PurePath(f).is_absolute() or ".." in PurePath(f).parts]
    shards = {path.name for path in directory.glob("model-*-of-*.safetensors")}
    shards |= {SINGLE} if (directory / SINGLE).exists() else set()
    return {
        "files of the index lie outside of the directory": outside,
        "files of the index are missing": [
            f for f in files if f not in outside and not (directory / f).is_file()
        ],
        "files are not in the index": sorted(shards - set(files)),
    }


def _index_problems(
    index: Mapping[str, str], headers: Mapping[str, Iterable[str]]
) -> dict[str, list[str]]:
    stored = {(name, file) for file, header in headers.items() for name in header}
    found = {
        "tensors of the index are not in their file": index.items() - stored,
        "tensors are in a file where the index does not have them": stored - index.items(),
    }
    return {
        what: sorted(f"{name} ({file})" for name, file in pairs) for what, pairs in found.items()
    }


def _fp8_problems(infos: Mapping[str, TensorInfo]) -> dict[str, list[str]]:
    """What keeps FP8 tensors from being dequantised."""
    fp8 = {n: i.shape for n, i in infos.items() if i.dtype == torch.float8_e4m3fn}
    scales = {n.removesuffix(SCALE_SUFFIX): i for n, i in infos.items() if n.endswith(SCALE_SUFFIX)}
    wanted = {
        name: TensorInfo(torch.float32, scale_shape(shape))
        for name, shape in fp8.items()
        if len(shape) == 2
    }
    return {
        "FP8 tensors are not matrices": [name for name in fp8 if name not in wanted],
        f"FP8 tensors have no {SCALE_SUFFIX}": [name for name in wanted if name not in scales],
        f"{SCALE_SUFFIX} have no FP8 tensor": [name for name in scales if name not in fp8],
        f"{SCALE_SUFFIX} are of the wrong kind": [
            f"{name} expected {want} got {scales[name]}"
            for name, want in wanted.items()
            if name in scales and scales[name] != want
        ],
    }


def _refuse(directory: Path, problems: Mapping[str, Sequence[str]]) -> None:
    found = [listed(what, names) for what, names in problems.items() if names]
    if found:
        raise ValueError(f"{directory}: {'; '.join(found)}; fetch or export the checkpoint again")
