"""What every layer of a running, distributed model gives, brought to rank 0 in document order.

Hooks on this rank's chunks keep each layer's output while the trainer's own forward runs. Which
tokens a rank holds is not worked out again here: the caller sends the tokens' numbers through the
trainer's own slicing (`tags`), so pipeline, context and data parallelism and packed rows are all
alike. Exchange goes over gloo and host memory: rank 0 may compute for an hour afterwards, and NCCL
would have given the others up by then.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dsv3.convert.bridge import Bridge
from megatron_dsv3.model.router import DeepseekV3Router

EMBEDDING = "embedding"
NO_DOCUMENT = -1
"""Tag of padding."""


def layer_key(layer: int) -> str:
    """Output of a decoder layer, before any final norm."""
    return f"layer {layer}"


def mtp_key(depth: int) -> str:
    """Output of an MTP layer, after its norm; depth 0 is the first."""
    return f"MTP layer {depth}"


def logits_key(depth: int) -> str:
    """Logits; depth 0 is the main prediction."""
    return f"logits {depth}"


def choice_key(part: str) -> str:
    """Which experts the router of a layer, `layer_key` or `mtp_key`, chose."""
    return f"experts of {part}"


@dataclass
class Capture:
    """Outputs on this rank by key, one a micro-batch, on the CPU."""

    bridge: Bridge
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    """[tokens of this rank, features] each."""
    _logits_seen: int = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keeps what the layers give while the context is open."""
        handles = list(self._hooks())
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self) -> Iterator[Any]:
        for chunk, stage in zip(self.bridge.chunks, self.bridge.stages, strict=True):
            for layer, module in zip(stage.layers, chunk.decoder.layers, strict=True):
                if layer == 0:
                    yield module.register_forward_pre_hook(self._keep_input, with_kwargs=True)
                yield from self._watch(module, layer_key(layer))
            for depth in stage.mtp_layers:
                yield from self._watch(chunk.mtp.layers[depth], mtp_key(depth))
            if stage.has_loss:
                yield chunk.output_layer.register_forward_hook(self._keep_logits)

    def _watch(self, module: nn.Module, key: str) -> Iterator[Any]:
        yield module.register_forward_hook(lambda _m, _args, output: self._keep(key, output))
        for router in module.modules():
            if isinstance(router, DeepseekV3Router):
                yield router.register_forward_hook(
                    lambda _m, _args, output: self._keep_choice(choice_key(key), output[1])
                )

    def _keep_input(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._keep(EMBEDDING, args[0] if args else kwargs["hidden_states"])

    def _keep_logits(self, _module: nn.Module, _args: Any, output: Any) -> None:
        # One head serves all depths, in order.
        depths = 1 + self.bridge.arch.num_mtp_layers
        self._keep(logits_key(self._logits_seen % depths), output)
        self._logits_seen += 1

    def _keep_choice(self, key: str, routing_map: Tensor) -> None:
        kept = routing_map.detach().to("cpu", torch.uint8)  # gloo sends no bool
        self.outputs.setdefault(key, []).append(kept)

    def _keep(self, key: str, output: Any) -> None:
        tensor: Tensor = output[0] if isinstance(output, tuple) else output
        # A copy in any case: the cross-entropy overwrites logits in place.
        kept = tensor.detach().to("cpu", copy=True).flatten(0, 1)
        self.outputs.setdefault(key, []).append(kept)

    def gather(self, tags: Sequence[Tensor], group: dist.ProcessGroup) -> "Gathered | None":
        """Collective: brings everything to rank 0; None on the others.

        Args:
            tags: Of each micro-batch, the numbers of the tokens that this context-parallel rank
                holds, in its order: `NO_DOCUMENT` for padding. [tokens] each.
            group: Of all ranks, for tensors on the CPU.
        """
        groups = self.bridge.groups
        whole = torch.cat(list(tags))
        # Under sequence parallelism a rank holds a part of the hidden states, but of all logits.
        parts = [t.chunk(groups.collection.tp.size())[groups.tp_rank] for t in tags]
        mine = {key: torch.cat(held) for key, held in self.outputs.items()}
        mine |= {_ALL_TAGS: whole, _PART_TAGS: torch.cat(parts)}
        descriptions: list[Any] = [None] * groups.world_size
        described = {key: (tuple(held.shape), held.dtype) for key, held in mine.items()}
        dist.all_gather_object(descriptions, (groups.tp_rank, described), group=group)
        gathered = Gathered()
        for rank, (tp_rank, description) in enumerate(descriptions):
            for key, (shape, dtype) in description.items():
                if rank == groups.rank and rank != 0:
                    dist.send(mine[key].contiguous(), dst=0, group=group)
                elif groups.rank == 0:
                    held = mine[key] if rank == 0 else torch.empty(shape, dtype=dtype)
                    if rank != 0:
                        dist.recv(held, src=rank, group=group)
                    gathered.pieces.setdefault(key, []).append(_Piece(rank, tp_rank, held))
        return gathered if groups.rank == 0 else None


_ALL_TAGS, _PART_TAGS = "tags", "tags of this rank's part"


@dataclass(frozen=True, slots=True)
class _Piece:
    rank: int
    tp_rank: int
    held: Tensor


@dataclass
class Gathered:
    """All ranks' pieces, on rank 0."""

    pieces: dict[str, list[_Piece]] = field(default_factory=dict)

    def take(self, key: str, num_tokens: int) -> Tensor:
        """One key's whole tensor [num_tokens, features] in the order of the tags; frees the pieces.

        Raises:
            ValueError: Some token's output is on no rank.
        """
        pieces = self.pieces.pop(key, [])
        split_features = key.startswith("logits")
        tags = {p.rank: p.held for p in self.pieces[_ALL_TAGS if split_features else _PART_TAGS]}
        shards = 1 + max((p.tp_rank for p in pieces), default=0) if split_features else 1
        whole = seen = None
        for piece in pieces:
            if whole is None or seen is None:
                whole = piece.held.new_zeros(num_tokens, shards, piece.held.size(-1))
                seen = torch.zeros(num_tokens, shards, dtype=torch.bool)
            real = tags[piece.rank] != NO_DOCUMENT
            rows, shard = tags[piece.rank][real], piece.tp_rank if split_features else 0
            whole[rows, shard] = piece.held[real]
            seen[rows, shard] = True
        if whole is None or seen is None or not bool(seen.all()):
            missing = num_tokens if seen is None else int((~seen.all(1)).sum())
            raise ValueError(f"{key}: no rank has the output of {missing} of {num_tokens} tokens")
        return whole.flatten(1)
