"""Where Megatron-Core keeps each Hugging Face tensor in a checkpoint, asked of the model itself.

A whole model on the meta device says under which sharded key, and where inside of that tensor, each
of its parameters is stored; the table says which HF tensors make up the parameter. Megatron-Core is
imported by a process of its own, whose memory is gone before the first tensor is read.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.convert.mapping import Param, Shape, by_mcore_name, mcore_copies

SPELLINGS: tuple[Mapping[str, Any], ...] = ({}, {"singleton_local_shards": True})
"""Options of Megatron-Core's `sharded_state_dict` that change keys; the first is what we write."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of a sharded tensor that is one HF tensor."""

    key: str
    offsets: Shape
    sizes: Shape
    num_leading: int = 0
    """First dims, of size 1, that the sharded tensor has and the HF tensor does not have."""

    @property
    def hf_shape(self) -> Shape:
        """Shape of the HF tensor."""
        return self.sizes[self.num_leading :]


@dataclass(frozen=True, slots=True)
class MegatronLayout:
    """A checkpoint of a model, without its numbers."""

    boxes: Mapping[str, Box]
    """Of each HF tensor but copies, in the order of the model."""
    shapes: Mapping[str, Shape]
    """Whole shape of each sharded tensor."""
    objects: tuple[str, ...]
    """Keys of Transformer Engine's `_extra_state`, an empty byte tensor each, without which a
    strict load fails."""


def layouts(arch: Architecture) -> list[MegatronLayout]:
    """A checkpoint of this model in each of `SPELLINGS`."""
    # Spawned: Megatron-Core's import leaves threads, groups and 300 MB behind.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_layouts, arch).result()


def _layouts(arch: Architecture) -> list[MegatronLayout]:
    # In this process alone: it warns of itself at every construction.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    # A machine with GPUs is one without them here: nothing of theirs is needed or taken.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_dsv3.model import cpu
    from megatron_dsv3.model.build import build_chunks
    from megatron_dsv3.model.config import mcore_config
    from megatron_dsv3.model.groups import start, stop

    cpu.enable()
    parallel, device = Parallel(), torch.device("cpu")
    groups = start(parallel, device)
    try:
        config = mcore_config(arch, parallel, dtype=torch.bfloat16, device=device)
        (model,) = build_chunks(
            arch,
            parallel,
            groups,
            config,
            max_seq_length=arch.max_position_embeddings,
            transformer_engine=False,
            meta=True,
        )
        dp_cp = groups.collection.dp_cp
        return [
            layout_of(arch, model.sharded_state_dict(metadata={"dp_cp_group": dp_cp, **spelling}))
            for spelling in SPELLINGS
        ]
    finally:
        stop()


def layout_of(arch: Architecture, state: Mapping[str, Any]) -> MegatronLayout:
    """Reads a layout off the sharded state dict of one unwrapped model that is not split.

    Raises:
        ValueError: The state dict and the table disagree.
    """
    table, copies = by_mcore_name(arch), mcore_copies(arch)
    shapes: dict[str, Shape] = {}
    objects: list[str] = []
    found: dict[str, Box] = {}
    unmapped = []
    for name, entry in state.items():
        if hasattr(entry, "unique_key"):
            objects.append(entry.unique_key)
            continue
        parts = entry.build() if hasattr(entry, "build") else entry
        parts = parts if isinstance(parts, list) else [parts]
        param = table.get(copies.get(name, name))
        if param is None:
            unmapped.append(name)
            continue
        shapes |= {part.key: tuple(part.global_shape) for part in parts}
        found |= dict(_boxes(param, parts))
    missing = {name for param in table.values() for name in param.hf} - found.keys()
    if unmapped or missing:
        raise ValueError(
            f"the model and the mapping table disagree: no row for {sorted(unmapped)}, "
            f"no parameter for {sorted(missing)}"
        )
    ordered = {name: found[name] for param in table.values() for name in param.hf}
    return MegatronLayout(ordered, shapes, tuple(objects))


def _boxes(param: Param, parts: list[Any]) -> Iterator[tuple[str, Box]]:
    """Megatron-Core stores a parameter joined of several as several parts, in the same order."""
    if len(parts) != len(param.hf):
        raise ValueError(f"{param.mcore}: expected {len(param.hf)} sharded parts, got {len(parts)}")
    for name, part in zip(param.hf, parts, strict=True):
        if tuple(part.local_shape) != param.hf_shape:
            raise ValueError(f"{name}: expected {param.hf_shape}, got {tuple(part.local_shape)}")
        leading = part.prepend_axis_num
        sizes = (1,) * leading + param.hf_shape
        yield name, Box(part.key, tuple(part.global_offset), sizes, leading)
