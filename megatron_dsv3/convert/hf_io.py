"""Hugging Face checkpoint directories: tensors read by name, written as shards with their index.

FP8 stays in here: `HFReader` gives bf16 for a tensor stored in e4m3 and hides its scales. A
directory is checked as a whole before its first tensor is read, and written under a temporary name
that becomes the target's once everything is there.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.durable import sync
from megatron_dsv3.convert.fp8 import BLOCK, SCALE_SUFFIX, dequantize
from megatron_dsv3.convert.hf_index import INDEX, SINGLE, listed, stored_tensors
from megatron_dsv3.convert.mapping import Shape, expand, hf_copies
from megatron_dsv3.convert.safetensors_file import (
    SafetensorsWriter,
    TensorInfo,
    explained,
    info_of,
    open_safetensors,
    read_ahead,
)

TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "chat_template*", "generation_config.json", "*.py"),
)
"""What belongs to a model besides weights and config.json; `*.py` is remote code."""
_MARKER = ".incomplete"
"""Tells a directory that a killed process left from one that somebody else needs."""


class HFReader:
    """The tensors of a checkpoint directory, by name.

    Files are mapped, not loaded: they cost no memory but pages that the system can drop again. Safe
    to use from several threads and after a fork.
    """

    def __init__(self, directory: Path, *, max_open: int = 8, ahead_bytes: int = 0) -> None:
        """Reads the header of every file.

        Args:
            directory: Holds model.safetensors, or shards with an index.
            max_open: Files kept mapped at once; a tensor in use keeps its own mapped.
            ahead_bytes: To be fetched behind every part that is read, for whom reads whole files.

        Raises:
            ValueError: The directory does not hold one complete checkpoint.
        """
        self.directory = directory
        self._ahead_bytes = ahead_bytes
        self._tensors = stored_tensors(directory)
        self._open = lru_cache(max_open)(open_safetensors)

    def names(self) -> list[str]:
        """All tensors, FP8 scales left out."""
        return [name for name in self._tensors if not name.endswith(SCALE_SUFFIX)]

    def shape(self, name: str) -> Shape:
        """Shape of the whole tensor."""
        return self._info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of what `read` gives."""
        return torch.bfloat16 if self.is_fp8(name) else self._info(name).dtype

    def is_fp8(self, name: str) -> bool:
        """Whether the tensor is stored in FP8."""
        return self._info(name).dtype == torch.float8_e4m3fn

    def read(
        self, name: str, slices: Sequence[slice] | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """A tensor or a rectangle of it; no other bytes are read.

        What is not FP8 comes as a view of the mapped file: writing to it changes what others read.

        Args:
            name: One of `names()`.
            slices: One for each leading dim, of step 1; None: everything.
            out: Where to write, instead of giving a view or a new tensor.
        """
        cut = _bounds(name, self.shape(name), slices or ())
        stored = self._stored(name, cut)
        if not self.is_fp8(name):
            return stored if out is None else out.copy_(stored)
        blocks = [slice(span.start // BLOCK, -(-span.stop // BLOCK)) for span in cut]
        scale_inv = self._stored(name + SCALE_SUFFIX, blocks)
        offset = (cut[0].start % BLOCK, cut[1].start % BLOCK)
        return dequantize(stored, scale_inv, offset=offset, out=out)

    def read_fp8(self, name: str, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """FP8 numbers as they are stored, and their scales; both are views of the mapped file.

        Args:
            name: A tensor stored in FP8.
            rows: Whole blocks of it; None: everything.
        """
        if not self.is_fp8(name):
            raise ValueError(f"{name}: expected torch.float8_e4m3fn, got {self.dtype(name)}")
        cut = _bounds(name, self.shape(name), [] if rows is None else [rows])
        if cut[0].start % BLOCK:
            raise ValueError(f"{name}: row {cut[0].start} is not the first of a block")
        blocks = slice(cut[0].start // BLOCK, -(-cut[0].stop // BLOCK))
        return self._stored(name, cut), self._stored(name + SCALE_SUFFIX, [blocks])

    def check_against(self, arch: Architecture) -> None:
        """Compares names and shapes with what this architecture has; copies may be absent.

        Raises:
            ValueError: All differences, listed.
        """
        shapes = {name: self.shape(name) for name in self.names()}
        check_tensors(shapes, arch, where=str(self.directory))

    def check_copies(self, arch: Architecture) -> None:
        """Compares every tensor that should repeat another one with it; for V3 that reads 6 GB.

        Raises:
            ValueError: All copies that differ, listed.
        """
        if differing := self.differing_copies(arch):
            raise ValueError(
                f"{self.directory}: {listed('copies differ', differing)}; Megatron-Core holds one "
                f"tensor for both, so one of them would be lost: remove the copies to go on"
            )

    def differing_copies(self, arch: Architecture) -> list[str]:
        """`copy from original` for each tensor that should repeat another one and does not."""
        return [
            f"{copy} from {original}"
            for copy, original in hf_copies(arch).items()
            if copy in self._tensors and not torch.equal(self.read(copy), self.read(original))
        ]

    def _info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise ValueError(f"{self.directory}: has no tensor {name}")
        return self._tensors[name][1]

    def _stored(self, name: str, cut: Sequence[slice] = ()) -> Tensor:
        file = self._open(self._tensors[name][0])
        tensor: Tensor = file.get_slice(name)[tuple(cut)] if cut else file.get_tensor(name)
        if self._ahead_bytes:
            read_ahead(tensor, self._ahead_bytes)
        return tensor


def check_tensors(shapes: Mapping[str, Shape], arch: Architecture, *, where: str) -> None:
    """Compares names and shapes with what this architecture has; copies may be absent.

    Args:
        shapes: Of every tensor, FP8 scales left out.
        arch: Of the whole model.
        where: What to call the checkpoint in errors.

    Raises:
        ValueError: All differences, listed.
    """
    expected = {name: param.hf_shape for param in expand(arch) for name in param.hf}
    copies = {copy: expected[original] for copy, original in hf_copies(arch).items()}
    allowed = expected | copies
    missing = [name for name in expected if name not in shapes]
    surplus = [name for name in shapes if name not in allowed]
    wrong = [
        f"{name} expected {list(allowed[name])} got {list(shape)}"
        for name, shape in shapes.items()
        if name in allowed and shape != allowed[name]
    ]
    found = {"missing": missing, "surplus": surplus, "of the wrong shape": wrong}
    if problems := [listed(what, names) for what, names in found.items() if names]:
        raise ValueError(
            f"{where}: the tensors are not those that config.json promises: "
            f"{'; '.join(problems)}; {_way_out(arch, missing, surplus)}"
        )


def _bounds(name: str, shape: Shape, slices: Sequence[slice]) -> list[slice]:
    """One slice with start and stop for each dim; safetensors would clip what lies outside."""
    given = [*slices, *[slice(None)] * (len(shape) - len(slices))]
    cut = [
        slice(part.start or 0, size if part.stop is None else part.stop, part.step or 1)
        for part, size in zip(given, shape, strict=True)
    ]
    for part, size in zip(cut, shape, strict=True):
        if not 0 <= part.start < part.stop <= size or part.step != 1:
            raise ValueError(f"{name}: {part} is not a part of a dim of {list(shape)}")
    return cut


def _way_out(arch: Architecture, missing: Sequence[str], surplus: Sequence[str]) -> str:
    """The commonest difference of all: a tool dropped the MTP layer and left config.json alone."""
    blocks = [f"model.layers.{arch.num_layers + d}." for d in range(arch.num_mtp_layers + 1)]
    if missing and all(name.startswith(tuple(blocks[:-1])) for name in missing):
        return "to go without MTP, set num_nextn_predict_layers to 0 in config.json"
    if surplus and all(name.startswith(blocks[-1]) for name in surplus):
        return "if that is an MTP layer, raise num_nextn_predict_layers in config.json"
    return "take config.json and weights from the same checkpoint"


def write_hf(
    tensors: Iterable[tuple[str, Tensor]],
    directory: Path,
    *,
    config: Mapping[str, Any],
    template: Path | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a checkpoint from a stream of (HF name, tensor), holding one shard in memory.

    A single shard becomes model.safetensors without an index, as transformers saves it.

    Args:
        tensors: Not to be changed after they were given.
        directory: Absent or empty.
        config: Content of config.json.
        template: A checkpoint whose tokenizer, generation config and remote code are taken over.
        shard_bytes: Largest shard; a larger tensor gets one of its own.
    """
    files = [] if template is None else tokenizer_files(template)
    with staging_directory(directory) as staging:
        shards = [
            _write_shard(staging / _unnumbered(number), shard)
            for number, shard in enumerate(_shards(tensors, shard_bytes), start=1)
        ]
        if not shards:
            raise ValueError(f"{directory}: there is no tensor to write")
        with explained(staging):
            name_shards(staging, shards)
            write_json(staging / "config.json", config)
            for file in files:
                shutil.copyfile(file, staging / file.name)


def copy_tokenizer_files(source: Path, target: Path) -> list[str]:
    """Copies what belongs to a model besides weights and config.json; gives the names."""
    files = tokenizer_files(source)
    for file in files:
        shutil.copyfile(file, target / file.name)
    return [file.name for file in files]


def tokenizer_files(source: Path) -> list[Path]:
    """What belongs to a model besides weights and config.json."""
    if not source.is_dir():
        raise ValueError(f"{source}: no such directory; expected tokenizer files in it")
    files = {file for pattern in TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()}
    return sorted(files)


def check_target(directory: Path) -> None:
    """Raises ValueError if a checkpoint cannot be written there; ask before hours of work, too."""
    target, staging = _places(directory)
    if target.is_mount():
        raise ValueError(f"{target}: is a mount point and cannot be replaced; use a folder in it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: exists and is not an empty directory; choose another one")
    if staging.exists() and not (staging / _MARKER).exists():
        raise ValueError(f"{staging}: is needed as a temporary name; move it away")


def _places(directory: Path) -> tuple[Path, Path]:
    """Where a checkpoint goes, links followed, and where it grows until it is complete."""
    target = Path(os.path.realpath(directory))
    return target, target.with_name(target.name + ".tmp")


@contextmanager
def staging_directory(directory: Path) -> Iterator[Path]:
    """Gives `<directory>.tmp` to fill: it becomes `directory` on success and vanishes on failure.

    A process that is killed leaves it behind; the next one replaces it.
    """
    check_target(directory)
    target, staging = _places(directory)
    marker = staging / _MARKER
    shutil.rmtree(staging, ignore_errors=True)
    with explained(staging):
        staging.mkdir(parents=True)
        marker.touch()
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    with explained(target):
        marker.unlink()
        for path in (*staging.iterdir(), staging):
            sync(path)
        staging.replace(target)
        sync(target.parent)


def name_shards(directory: Path, shards: Sequence[Mapping[str, TensorInfo]]) -> None:
    """Gives `model-00001.safetensors`, ... their final names and writes the index.

    Args:
        directory: Where the shards are.
        shards: The tensors of each one.
    """
    files = shard_names(len(shards))
    for number, file in enumerate(files, start=1):
        (directory / _unnumbered(number)).rename(directory / file)
    write_index(directory, dict(zip(files, shards, strict=True)))


def write_index(directory: Path, shards: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """Writes which tensors each file holds; a single file has no index, as transformers saves it.

    Args:
        directory: Where the files are.
        shards: The tensors of each file.
    """
    if len(shards) == 1:
        return
    total = sum(info.nbytes for shard in shards.values() for info in shard.values())
    where = {name: file for file, shard in shards.items() for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    write_json(directory / INDEX, index)


def shard_names(count: int) -> list[str]:
    """What the files of a finished checkpoint are called."""
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _unnumbered(number: int) -> str:
    """What a shard is called while nobody knows how many there will be."""
    return f"model-{number:05}.safetensors"


def _shards(
    tensors: Iterable[tuple[str, Tensor]], shard_bytes: int
) -> Iterator[Mapping[str, Tensor]]:
    """Groups a stream by size; a group is emptied when the next one is asked for."""
    shard: dict[str, Tensor] = {}
    seen: set[str] = set()
    size = 0
    for name, tensor in tensors:
        if name in seen:
            raise ValueError(f"{name}: came twice; a checkpoint holds each tensor once")
        seen.add(name)
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            # The caller still holds it: with a new dictionary there would be two shards in memory.
            shard.clear()
            size = 0
        shard[name] = tensor.detach().cpu()
        size += tensor.nbytes
    if shard:
        yield shard


def _write_shard(path: Path, shard: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    layout = {name: info_of(tensor) for name, tensor in shard.items()}
    with SafetensorsWriter(path, layout) as writer:
        for name, tensor in shard.items():
            writer.write(name, tensor)
    return layout


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
