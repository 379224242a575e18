"""A consolidated state dict of XTuner's DeepseekV3ForCausalLM, read by Hugging Face name.

XTuner can train with `n` experts merged into one module. Of the MoE of a layer, module N holds

    experts.N.w1w3   [n, 2 * ffn, hidden]   gate_proj over up_proj of experts N*n to N*n + n-1
    experts.N.w2     [n, hidden, ffn]       their down_proj

A file has these or one tensor an expert; never both in one layer. The state dict may be the file's
content or stand under `state_dict` or `module` in it, and its names may begin with `llm.`, where
XTuner's wrapper keeps the model. Files are mapped: numbers stay on the disk until they are read.
"""

import pickle
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.convert.hf_index import listed
from megatron_dsv3.convert.safetensors_file import (
    TensorInfo,
    info_of,
    open_safetensors,
    read_header,
)

_WRAPPERS = ("state_dict", "module")
"""Keys under which training frameworks put a state dict."""
_PREFIX = "llm."
_MERGED = re.compile(r"(?P<stem>.+\.mlp\.experts\.)(?P<shard>\d+)\.(?P<part>w1w3|w2)")
_SINGLE = re.compile(r"(?P<stem>.+\.mlp\.experts\.)\d+\.\w+_proj\.weight")
_NOT_WEIGHTS = "rotary_emb.inv_freq"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor is: a whole stored one, or rows of one expert in it."""

    stored: str
    info: TensorInfo
    expert: int | None = None
    """Index in the first dim of what is stored."""
    first_row: int = 0


class XTunerSource:
    """The tensors of one file, as if no experts were merged."""

    def __init__(self, file: Path, arch: Architecture) -> None:
        """Reads names and shapes.

        Args:
            file: `.safetensors`, or what `torch.save` wrote: of that, nothing but tensors and plain
                containers is admitted.
            arch: Of the model that was trained.

        Raises:
            ValueError: It is damaged, holds other objects, or could be read in two ways.
        """
        self._file = file
        infos = self._opened.infos
        named = _without_prefix(file, infos)
        wrong = [f"{name} {infos[at]}" for name, at in named.items() if not _is_float(infos[at])]
        if wrong:
            raise ValueError(f"{file}: {listed('tensors are of an unexpected type', wrong)}")
        self._places = _places(
            file, {name: _Place(at, infos[at]) for name, at in named.items()}, arch
        )
        first_mtp = f"model.layers.{arch.num_layers}."
        has_mtp = any(name.startswith(first_mtp) for name in self._places)
        self.arch = arch if has_mtp else replace(arch, num_mtp_layers=0)
        """Of what the file holds: XTuner drops MTP layers that config.json goes on claiming."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """Type and shape of every tensor."""
        return {name: place.info for name, place in self._places.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file, which another process opens for itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    @cached_property
    def _opened(self) -> "_Opened":
        return _open(self._file)

    def read(self, name: str, rows: slice | None = None, *, out: Tensor | None = None) -> Tensor:
        """A tensor, or some rows of it; a view of the file, unless `out`."""
        place = self._places[name]
        tensor = self._opened.get(place.stored)
        if place.expert is not None:
            stop = place.first_row + place.info.shape[0]
            tensor = tensor[place.expert, place.first_row : stop]
        tensor = tensor if rows is None else tensor[rows]
        return tensor if out is None else out.copy_(tensor)


def _is_float(info: TensorInfo) -> bool:
    return info.dtype in _FLOATS


@dataclass(frozen=True, slots=True)
class _Opened:
    """A mapped file."""

    infos: Mapping[str, TensorInfo]
    get: Callable[[str], Tensor]


def _open(file: Path) -> _Opened:
    if not file.is_file():
        raise ValueError(
            f"{file}: expected a file with one whole state dict; consolidate a folder of DeepSpeed "
            f"shards with its zero_to_fp32.py first"
        )
    if file.suffix == ".safetensors":
        opened = open_safetensors(file)
        return _Opened(read_header(file), opened.get_tensor)
    tensors = _state_dict(file, _unpickled(file))
    infos = {name: info_of(tensor) for name, tensor in tensors.items()}
    return _Opened(infos, tensors.__getitem__)


def _unpickled(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{file}: holds more than tensors, and what it holds was not run ({reason}); save the "
            f"state dict alone"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file}: truncated, damaged or not from torch.save ({reason})") from None


def _state_dict(file: Path, content: Any) -> dict[str, Tensor]:
    inner = [key for key in _WRAPPERS if isinstance(content, Mapping) and key in content]
    if len(inner) > 1:
        raise ValueError(f"{file}: holds two state dicts, {' and '.join(inner)}; save one alone")
    content = content[inner[0]] if inner else content
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{file}: expected a state dict, got {type(content).__name__}")
    if other := sorted(str(k) for k, value in content.items() if not isinstance(value, Tensor)):
        raise ValueError(f"{file}: {listed('entries are no tensors', other)}")
    return dict(content)


def _without_prefix(file: Path, stored: Iterable[str]) -> dict[str, str]:
    """{HF name or merged name: name in the file}."""
    named: dict[str, str] = {}
    for at in stored:
        if at.endswith(_NOT_WEIGHTS):
            continue
        if (name := at.removeprefix(_PREFIX)) in named:
            raise ValueError(f"{file}: {at} and {named[name]} are two tensors of one name")
        named[name] = at
    return named


def _places(file: Path, named: Mapping[str, _Place], arch: Architecture) -> dict[str, _Place]:
    """Takes the merged experts apart."""
    places: dict[str, _Place] = {}
    merged: dict[str, dict[tuple[int, str], _Place]] = defaultdict(dict)
    single = set()
    for name, place in named.items():
        if match := _MERGED.fullmatch(name):
            merged[match["stem"]][int(match["shard"]), match["part"]] = place
            continue
        if match := _SINGLE.fullmatch(name):
            single.add(match["stem"])
        places[name] = place
    if both := sorted(single & merged.keys()):
        raise ValueError(
            f"{file}: {listed('layers hold experts both merged and one by one', both)}"
        )
    for stem, parts in merged.items():
        places |= _split(file, stem, parts, arch)
    return places


def _split(
    file: Path, stem: str, parts: Mapping[tuple[int, str], _Place], arch: Architecture
) -> dict[str, _Place]:
    """The experts of one layer, from its merged modules."""
    num_shards = 1 + max(shard for shard, _ in parts)
    count, remainder = divmod(arch.num_experts, num_shards)
    ffn, hidden = arch.moe_ffn_hidden_size, arch.hidden_size
    shapes = {"w1w3": (count, 2 * ffn, hidden), "w2": (count, hidden, ffn)}
    wanted = {(shard, part): shapes[part] for shard in range(num_shards) for part in shapes}
    got = {key: place.info.shape for key, place in parts.items()}
    if remainder or got != wanted:
        wrong = [
            f"{stem}{shard}.{part} expected {list(shape)} got {list(got.get((shard, part), ()))}"
            for (shard, part), shape in wanted.items()
            if got.get((shard, part)) != shape
        ]
        raise ValueError(
            f"{file}: {num_shards} merged modules of {stem} do not hold {arch.num_experts} experts "
            f"in equal parts: {listed('tensors do not fit', wrong)}; is config.json this model's?"
        )
    places: dict[str, _Place] = {}
    for (shard, part), place in parts.items():
        dtype = place.info.dtype
        for index in range(count):
            expert = f"{stem}{shard * count + index}."
            if part == "w2":
                down = TensorInfo(dtype, (hidden, ffn))
                places[f"{expert}down_proj.weight"] = _Place(place.stored, down, index)
                continue
            half = TensorInfo(dtype, (ffn, hidden))
            places[f"{expert}gate_proj.weight"] = _Place(place.stored, half, index)
            places[f"{expert}up_proj.weight"] = _Place(place.stored, half, index, first_row=ffn)
    return places
