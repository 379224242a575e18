"""Where a conversion reads from: any checkpoint as Hugging Face tensors, by name and by rows.

`infos()` has every tensor of the table and none of the copies that an HF directory may repeat (an
MTP block's embedding and head). Sources can be sent to another process; files are opened where they
are read.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import xxhash
from torch import Tensor

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.convert.hf_index import listed
from megatron_dsv3.convert.hf_io import HFReader
from megatron_dsv3.convert.mapping import by_hf_name
from megatron_dsv3.convert.megatron_io import AHEAD_BYTES, MegatronReader
from megatron_dsv3.convert.megatron_layout import Box, MegatronLayout, layouts
from megatron_dsv3.convert.safetensors_file import TensorInfo


class Source(Protocol):
    """A checkpoint of either format."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """HF name -> type and shape of what `read` gives, in the order of the model."""

    def read(self, name: str, rows: slice | None = None, *, out: Tensor | None = None) -> Tensor:
        """A tensor, or `rows` (start and stop) of its first dim; not to be changed."""


@dataclass(frozen=True)
class HFSource:
    """A Hugging Face directory; FP8 comes as bf16."""

    directory: Path
    arch: Architecture

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens the files itself.
        return {name: value for name, value in self.__dict__.items() if name != "reader"}

    @cached_property
    def reader(self) -> HFReader:
        """The open directory."""
        return HFReader(self.directory, ahead_bytes=AHEAD_BYTES)

    def check(self) -> None:
        """Raises ValueError unless the directory holds exactly this architecture's tensors."""
        self.reader.check_against(self.arch)
        self.reader.check_copies(self.arch)

    def infos(self) -> Mapping[str, TensorInfo]:
        """HF name -> type and shape of what `read` gives, in the order of the model."""
        reader = self.reader
        return {n: TensorInfo(reader.dtype(n), reader.shape(n)) for n in by_hf_name(self.arch)}

    def read(self, name: str, rows: slice | None = None, *, out: Tensor | None = None) -> Tensor:
        """A tensor or rows of it; what is not FP8 is a view of the mapped file, unless `out`."""
        return self.reader.read(name, None if rows is None else [rows], out=out)


@dataclass(frozen=True)
class MegatronSource:
    """A `torch_dist` checkpoint, weights-only or of a whole training run."""

    reader: MegatronReader
    boxes: Mapping[str, Box]
    """Keys are those of the file: under `source="master"` the optimizer's."""
    frozen: tuple[str, ...] = ()
    """Under `source="master"`: tensors without a master, taken from the weights."""

    @classmethod
    def open(
        cls, directory: Path, arch: Architecture, *, source: Literal["weights", "master"]
    ) -> "MegatronSource":
        """Finds every tensor of the architecture in the checkpoint.

        Args:
            directory: The checkpoint.
            arch: Of the model in it.
            source: The weights that the model computes with, or the optimizer's fp32 masters.

        Raises:
            ValueError: A tensor is missing or surplus or of the wrong shape, all listed.
        """
        reader = MegatronReader(directory)
        infos = reader.infos()
        boxes = _matching(directory, layouts(arch), infos)
        # A buffer has no master, a parameter that was not trained has none either.
        masters = _masters(directory, infos) if source == "master" else {}
        frozen = [name for name, box in boxes.items() if masters and box.key not in masters]
        chosen = {
            name: replace(box, key=masters.get(box.key, box.key)) for name, box in boxes.items()
        }
        keys = dict.fromkeys(box.key for box in chosen.values())
        return cls(reader.only(keys), chosen, tuple(frozen))

    def infos(self) -> Mapping[str, TensorInfo]:
        """HF name -> type and shape of what `read` gives, in the order of the model."""
        return {
            name: TensorInfo(self.reader.info(box.key).dtype, box.hf_shape)
            for name, box in self.boxes.items()
        }

    def read(self, name: str, rows: slice | None = None, *, out: Tensor | None = None) -> Tensor:
        """A tensor or rows of it, in new memory or in `out`."""
        if name not in self.boxes:
            raise ValueError(f"{self.reader.directory}: has no tensor {name}")
        box = self.boxes[name]
        lead = box.num_leading
        cut = [slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True)]
        if rows is not None:
            first = box.offsets[lead]
            cut[lead] = slice(first + rows.start, first + rows.stop)
        shape = [part.stop - part.start for part in cut]
        dtype = self.reader.info(box.key).dtype
        target = torch.empty(shape, dtype=dtype) if out is None else out.view(shape)
        return self.reader.read(box.key, cut, out=target).view(shape[lead:])


def _matching(
    directory: Path, candidates: list[MegatronLayout], infos: Mapping[str, TensorInfo]
) -> Mapping[str, Box]:
    """The boxes of the spelling that the checkpoint is written in.

    Raises:
        ValueError: None fits; what is wrong with the nearest one.
    """
    weights = {key: info.shape for key, info in infos.items() if not _is_optimizer(key)}
    layout = max(candidates, key=lambda c: len(c.shapes.keys() & weights.keys()))
    found = {
        "missing": [key for key in layout.shapes if key not in weights],
        "surplus": [key for key in weights if key not in layout.shapes],
        "of the wrong shape": [
            f"{key} expected {list(shape)} got {list(weights[key])}"
            for key, shape in layout.shapes.items()
            if key in weights and weights[key] != shape
        ],
    }
    if problems := [listed(what, names) for what, names in found.items() if names]:
        raise ValueError(
            f"{directory}: the tensors are not those that config.json promises: "
            f"{'; '.join(problems)}; take the config.json of the model that was trained"
        )
    return layout.boxes


_MASTER = re.compile(r"^(?:chained_\d+\.)?optimizer\.state\.(?:param|fp32_param)\.(.+)$")
"""`fully_reshardable` says param, `fully_sharded_model_space` says fp32_param."""


def _is_optimizer(key: str) -> bool:
    return key.startswith(("optimizer.", "chained_"))


def _masters(directory: Path, infos: Mapping[str, TensorInfo]) -> dict[str, str]:
    """{key of the weight: key of its fp32 master}."""
    masters = {match[1]: key for key in infos if (match := _MASTER.match(key))}
    if masters:
        return masters
    if any(_is_optimizer(key) for key in infos):
        raise ValueError(
            f"{directory}: the optimizer's state is saved in buckets, which one layout alone can "
            f"read; save it as fully_reshardable, or convert the weights"
        )
    raise ValueError(f"{directory}: holds weights without masters; convert the weights")


def fingerprint(place: Path) -> str:
    """Tells a checkpoint, directory or file, from any other, and from itself written anew."""
    kinds = ("*.safetensors*", "*.distcp", ".metadata")
    files = [place] if place.is_file() else sorted(f for kind in kinds for f in place.glob(kind))
    # Two fine-tuned copies of a model have the same names and sizes: only times tell them apart.
    marks = [(f.name, (stat := f.stat()).st_size, int(stat.st_mtime)) for f in files]
    return xxhash.xxh3_128_hexdigest(json.dumps(marks).encode())
