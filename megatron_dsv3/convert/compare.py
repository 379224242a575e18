"""Two checkpoints compared tensor by tensor, some rows in memory at a time.

Numbers are compared by their bits in fp32, whatever type each checkpoint stores them in: an FP8
tensor stands for the bf16 numbers that it gives, a NaN equals itself, and 0 is not -0.
"""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dsv3.convert.hf_io import HFReader
from megatron_dsv3.convert.safetensors_file import TensorInfo
from megatron_dsv3.convert.sources import Source
from megatron_dsv3.convert.tensors import row_spans

_ELEMENTS = 1 << 21
"""Of a tensor at a time and thread: 24 bytes for each."""


@dataclass(frozen=True, slots=True)
class Element:
    """One element that differs."""

    index: tuple[int, ...]
    a: float
    b: float


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor that differs."""

    name: str
    numel: int
    num_different: int
    """Elements."""
    relative_error: float
    """Length of the difference, where the first checkpoint's tensor has length 1; inf: NaN or Inf
    are on one side."""
    first: Element


@dataclass(frozen=True, slots=True)
class Comparison:
    """All of it; lists are in the order of the first checkpoint."""

    num_tensors: int
    """That both have in one shape."""
    numel: int
    """Their elements."""
    only_a: list[str]
    only_b: list[str]
    shapes: list[str]
    """Tensors of two shapes; their numbers are not compared."""
    differences: list[Difference]

    @property
    def is_equal(self) -> bool:
        """Whether both hold the same tensors with the same numbers."""
        return not (self.only_a or self.only_b or self.shapes or self.differences)

    @property
    def worst(self) -> Difference | None:
        """The largest relative error."""
        return max(self.differences, key=lambda found: found.relative_error, default=None)

    def is_within(self, tolerance: float) -> bool:
        """Whether both hold the same tensors, and no relative error is larger."""
        same_tensors = not (self.only_a or self.only_b or self.shapes)
        return same_tensors and all(d.relative_error <= tolerance for d in self.differences)


class WholeHF:
    """All that a Hugging Face directory holds, copies and strange tensors included."""

    def __init__(self, directory: Path) -> None:
        """Reads the headers."""
        self._reader = HFReader(directory)

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor's type and shape, scales left out."""
        reader = self._reader
        return {name: TensorInfo(reader.dtype(name), reader.shape(name)) for name in reader.names()}

    def read(self, name: str, rows: slice | None = None, *, out: Tensor | None = None) -> Tensor:
        """A tensor, or some rows of it."""
        return self._reader.read(name, None if rows is None else [rows], out=out)


@dataclass(frozen=True)
class WithCopies:
    """A source whose format holds one tensor where Hugging Face's holds it and copies of it."""

    source: Source
    copies: Mapping[str, str]
    """{copy: original}, given out as tensors of their own."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor's type and shape, copies included."""
        infos = self.source.infos()
        return {**infos, **{copy: infos[original] for copy, original in self.copies.items()}}

    def read(self, name: str, rows: slice | None = None, *, out: Tensor | None = None) -> Tensor:
        """A tensor, or some rows of it."""
        return self.source.read(self.copies.get(name, name), rows, out=out)


def compare(
    a: Source, b: Source, *, workers: int = 1, progress: Callable[[int], Any] = lambda numel: None
) -> Comparison:
    """Compares every tensor.

    Args:
        a: The reference.
        b: What is held against it.
        workers: Threads; each has a few rows of one tensor in memory.
        progress: Called with the elements of each tensor that is done.
    """
    infos_a, infos_b = a.infos(), b.infos()
    both = [name for name in infos_a if name in infos_b]
    common = [name for name in both if infos_a[name].shape == infos_b[name].shape]
    shapes = [
        f"{name} {list(infos_a[name].shape)} against {list(infos_b[name].shape)}"
        for name in both
        if infos_a[name].shape != infos_b[name].shape
    ]

    def one(name: str) -> Difference | None:
        found = _compare_tensor(name, a, b, infos_a[name])
        progress(math.prod(infos_a[name].shape))
        return found

    with ThreadPoolExecutor(workers) as pool:
        differences = [found for found in pool.map(one, common) if found is not None]
    return Comparison(
        num_tensors=len(common),
        numel=sum(math.prod(infos_a[name].shape) for name in common),
        only_a=[name for name in infos_a if name not in infos_b],
        only_b=[name for name in infos_b if name not in infos_a],
        shapes=shapes,
        differences=differences,
    )


def _compare_tensor(name: str, a: Source, b: Source, info: TensorInfo) -> Difference | None:
    num_different, first = 0, None
    squares = norm = 0.0
    for rows in row_spans(info.shape, elements=_ELEMENTS):
        left, right = a.read(name, rows), b.read(name, rows)
        if left.dtype == right.dtype and _same_bits(left, right):
            norm += _square(left)
            continue
        before, after = left.float(), right.float()
        differs = before.view(torch.int32) != after.view(torch.int32)
        if (count := int(differs.count_nonzero())) and first is None:
            first = _element(differs, before, after, rows.start)
        num_different += count
        norm += _square(before)
        squares += _square(after - before)
    if first is None:
        return None
    return Difference(name, math.prod(info.shape), num_different, _relative(squares, norm), first)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _square(tensor: Tensor) -> float:
    values = tensor.float().flatten()
    return float(values.dot(values))


def _relative(squares: float, norm: float) -> float:
    if not squares:
        return 0.0
    ratio = math.sqrt(squares / norm) if norm else math.inf
    return math.inf if math.isnan(ratio) else ratio


def _element(differs: Tensor, a: Tensor, b: Tensor, first_row: int) -> Element:
    index = differs.nonzero()[0].tolist()
    values = [float(tensor[tuple(index)]) for tensor in (a, b)]
    return Element((index[0] + first_row, *index[1:]), *values)
