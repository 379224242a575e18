"""A live, sharded model <-> Hugging Face: every rank reads its slices and takes part in the export.

Both ways walk the one table. Strict: a tensor that is unmapped, missing, surplus or wrongly shaped
stops the work on every rank, all names listed, before anything else goes on.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.placement import Stage, place
from megatron_dsv3.convert.fp8 import SCALE_SUFFIX, quantize
from megatron_dsv3.convert.hf_io import HFReader
from megatron_dsv3.convert.mapping import (
    Param,
    Shard,
    by_hf_name,
    by_mcore_name,
    expand,
    exported_copies,
    global_name,
    mcore_copies,
)
from megatron_dsv3.convert.tensors import from_shards, hf_slices, pieces_of, shard_shape
from megatron_dsv3.model.gpt import DeepseekV3Model
from megatron_dsv3.model.groups import Groups, raise_together


@dataclass(frozen=True)
class Bridge:
    """A model's chunks on this rank, and what places their parameters in the whole model."""

    chunks: Sequence[DeepseekV3Model]
    """Unwrapped, one per virtual stage."""
    arch: Architecture
    parallel: Parallel
    groups: Groups
    checkpoint: Architecture | None = None
    """Of the files, where they hold MTP layers that the model leaves out; None: the model's."""

    def load(self, reader: HFReader) -> None:
        """Fills the chunks, reading just this rank's slices.

        Raises:
            ValueError: On every rank, if any rank failed; the model must not be used then.
        """
        problem = ""
        try:
            reader.check_against(self.checkpoint or self.arch)
            if self.groups.rank == 0:  # one reader of the copies is enough
                reader.check_copies(self.checkpoint or self.arch)
            for param, tensor in self.local_tensors():
                self._fill(param, tensor, reader)
        except (ValueError, OSError) as error:
            problem = str(error)
        raise_together(problem)

    def export(
        self, *, dtype: torch.dtype, untouched: HFReader | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The whole model as (HF name, CPU tensor), on rank 0 only, one parameter in flight.

        Collective: every rank must exhaust it. MTP's copies of embedding and head are written, and
        `expert_bias` stays fp32.

        Args:
            dtype: Of the weights.
            untouched: Where MTP layers that the model leaves out come from.
        """
        held = {param.mcore: tensor for param, tensor in self.local_tensors()}
        senders = self._senders()
        whole_arch = self.checkpoint or self.arch
        copies = exported_copies(whole_arch)
        originals: dict[str, Tensor] = {}
        for param in expand(whole_arch):
            kept = torch.float32 if param.is_buffer else dtype
            if param.mtp_depth is not None and param.mtp_depth >= self.arch.num_mtp_layers:
                assert untouched is not None
                if self.groups.rank == 0:
                    yield from ((name, untouched.read(name).to(kept)) for name in param.hf)
                continue
            sources = [
                senders[self._address(param, part)] for part in range(self._shard_size(param))
            ]
            shards = self._collect(param, held.get(param.mcore), sources, kept)
            if self.groups.rank != 0:
                continue
            for name, whole in zip(param.hf, from_shards(param, shards), strict=True):
                if name in copies.values():
                    originals[name] = whole
                yield name, whole
        if self.groups.rank == 0:
            yield from ((copy, originals[original]) for copy, original in copies.items())

    def local_tensors(self) -> list[tuple[Param, Tensor]]:
        """Every tensor of the chunks that weights are made of, with its row of the table.

        Raises:
            ValueError: A parameter without a row, or a row of these stages without its parameter.
        """
        table, copies = by_mcore_name(self.arch), mcore_copies(self.arch)
        found: list[tuple[Param, Tensor]] = []
        unmapped: list[str] = []
        for chunk, stage in zip(self.chunks, self.stages, strict=True):
            for local, tensor in _weights(chunk):
                name = global_name(
                    local, layers=stage.layers, expert_offset=self.groups.ep_rank * self._num_local
                )
                param = table.get(copies.get(name, name))
                if param is None:
                    unmapped.append(name)
                else:
                    found.append((param, tensor))
        here = {param.mcore for param in table.values() if self._is_here(param)}
        missing = here - {param.mcore for param, _ in found}
        if unmapped or missing:
            raise ValueError(
                f"the model and the mapping table disagree: no row for {sorted(unmapped)}, "
                f"no parameter for {sorted(missing)}"
            )
        return found

    @property
    def _num_local(self) -> int:
        return self.arch.num_experts // self.parallel.ep_size

    @cached_property
    def _all_stages(self) -> tuple[Stage, ...]:
        return place(self.arch, self.parallel)

    @cached_property
    def stages(self) -> list[Stage]:
        """Where this rank's chunks stand, in their order."""
        return [stage for stage in self._all_stages if stage.pp_rank == self.groups.pp_rank]

    def _is_here(self, param: Param) -> bool:
        """Whether this rank must hold (a part of) the parameter; second copies do not count."""
        if not any(_on_stage(param, stage) for stage in self.stages):
            return False
        return param.expert is None or param.expert // self._num_local == self.groups.ep_rank

    def _shard_size(self, param: Param) -> int:
        if param.shard is Shard.NONE:
            return 1
        return self.parallel.etp_size if param.is_expert else self.parallel.tp_size

    def _shard_rank(self, param: Param) -> int:
        if param.shard is Shard.NONE:
            return 0
        return self.groups.etp_rank if param.is_expert else self.groups.tp_rank

    @torch.no_grad()
    def _fill(self, param: Param, tensor: Tensor, reader: HFReader) -> None:
        size = self._shard_size(param)
        cuts = hf_slices(param, self._shard_rank(param), size)
        quantised = hasattr(tensor, "get_high_precision_init_val")
        whole = torch.empty(tensor.shape, dtype=tensor.dtype) if quantised else tensor
        for target, cut in zip(pieces_of(param, whole, size), cuts, strict=True):
            target.copy_(reader.read(cut.name, cut.slices))
        if quantised:
            # Transformer Engine's FP8 parameter. The optimizer takes its master from the attribute,
            # which holds what the constructor saw, and drops it then.
            tensor.copy_(whole.to(tensor.device))
            tensor._high_precision_init_val = whole  # type: ignore[attr-defined]

    def _address(self, param: Param, part: int) -> "_Address":
        pp_rank = next(s.pp_rank for s in self._all_stages if _on_stage(param, s))
        ep_rank = 0 if param.expert is None else param.expert // self._num_local
        return _Address(pp_rank, part, ep_rank, param.is_expert)

    def _senders(self) -> dict["_Address", int]:
        """The lowest rank that holds each part; the same on every rank."""
        groups = self.groups
        mine = (groups.pp_rank, groups.tp_rank, groups.etp_rank, groups.ep_rank)
        everyone: list[tuple[int, int, int, int]] = [mine] * groups.world_size
        dist.all_gather_object(everyone, mine)
        senders: dict[_Address, int] = {}
        for rank, (pp_rank, tp_rank, etp_rank, ep_rank) in enumerate(everyone):
            senders.setdefault(_Address(pp_rank, tp_rank, 0, is_expert=False), rank)
            senders.setdefault(_Address(pp_rank, etp_rank, ep_rank, is_expert=True), rank)
        return senders

    def _collect(
        self, param: Param, held: Tensor | None, sources: Sequence[int], dtype: torch.dtype
    ) -> list[Tensor]:
        """Brings the parts of one parameter to rank 0, in order; other ranks get nothing."""
        shards = []
        for source in sources:
            if self.groups.rank == source:
                assert held is not None
                part = held.detach().to(dtype).contiguous()
                if source != 0:
                    dist.send(part, dst=0)
            elif self.groups.rank == 0:
                shape = shard_shape(param, len(sources))
                part = torch.empty(shape, dtype=dtype, device=self.groups.device)
                dist.recv(part, src=source)
            if self.groups.rank == 0:
                shards.append(part.cpu())
        return shards


@dataclass(frozen=True, slots=True)
class _Address:
    """Which ranks hold a part: any with these coordinates."""

    pp_rank: int
    part: int
    """Of a split tensor: tp_rank, or for experts etp_rank."""
    ep_rank: int
    is_expert: bool


def _on_stage(param: Param, stage: Stage) -> bool:
    if param.layer is not None:
        return param.layer in stage.layers
    if param.mtp_depth is not None:
        return param.mtp_depth in stage.mtp_layers
    ends = {
        "embedding": stage.has_embedding,
        "decoder": stage.has_final_norm,
        "output_layer": stage.has_loss,
    }
    return ends[param.mcore.partition(".")[0]]


def _weights(chunk: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers (expert_bias); `_extra_state` is neither."""
    state = chunk.state_dict(keep_vars=True)
    named = {name for name, _ in chunk.named_parameters()} | {n for n, _ in chunk.named_buffers()}
    yield from ((name, tensor) for name, tensor in state.items() if name in named)


def in_fp8(
    stream: Iterable[tuple[str, Tensor]], arch: Architecture
) -> Iterator[tuple[str, Tensor]]:
    """An exported stream as DeepSeek stores it: matrices in FP8, scales beside them, the rest BF16.

    Args:
        stream: From `Bridge.export`, in the type of the live weights.
        arch: Of the whole model.
    """
    params = by_hf_name(arch)
    for name, tensor in stream:
        param = params.get(name)  # None: a copy of embedding or head, which stay in BF16
        if param is not None and param.quantised:
            weight, scale_inv = quantize(tensor, name=name)
            yield from ((name, weight), (name + SCALE_SUFFIX, scale_inv))
        elif param is not None and param.is_buffer:
            yield name, tensor
        else:
            yield name, tensor.bfloat16()
