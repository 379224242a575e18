"""Where a conversion reads from: any checkpoint as Hugging Face tensors, by name and by rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.convert.hf_io import HFReader
from megatron_dsv3.convert.mapping import by_hf_name
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
        return {name: value for name, value in self.__dict__.items() if name != "reader"}

    @cached_property
    def reader(self) -> HFReader:
        """The open directory."""
        return HFReader(self.directory)

    def infos(self) -> Mapping[str, TensorInfo]:
        """HF name -> type and shape of what `read` gives, in the order of the model."""
        reader = self.reader
        return {n: TensorInfo(reader.dtype(n), reader.shape(n)) for n in by_hf_name(self.arch)}

    def read(self, name: str, rows: slice | None = None, *, out: Tensor | None = None) -> Tensor:
        """A tensor or rows of it; what is not FP8 is a view of the mapped file, unless `out`."""
        return self.reader.read(name, None if rows is None else [rows], out=out)
