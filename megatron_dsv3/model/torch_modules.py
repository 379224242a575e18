"""In plain torch what Transformer Engine supplies on a GPU, holding parameters exactly as it does.

Names, shapes, order, sharding marks and sharded keys are Transformer Engine's, so that state dicts,
checkpoints and the mapping table know one spelling and a checkpoint moves between the two freely.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    get_cuda_rng_tracker,
)
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn

InitMethod = Callable[[Tensor], Any]


class ExtraState:
    """Transformer Engine's `_extra_state` without FP8: an empty byte tensor, ignored on load.

    A Transformer Engine model's strict load fails on a checkpoint that has none.
    """

    def get_extra_state(self) -> Tensor:
        """What a Transformer Engine module saves when it holds no FP8 state."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: object) -> None:
        """FP8 state of a GPU run means nothing here."""

    def fill_in_extra_state(self) -> None:
        """Lets a strict load accept dicts without extra states; call in `__init__`."""
        self._register_load_state_dict_pre_hook(_default_extra_state)  # type: ignore[attr-defined]


def _default_extra_state(state: dict[str, Any], prefix: str, *_: object) -> None:
    state.setdefault(prefix + "_extra_state", torch.empty(0, dtype=torch.uint8))


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last dim, computed in fp32, returned in the dtype of `x`."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * normed.to(x.dtype)


class RMSNorm(ExtraState, nn.Module):
    """`te.pytorch.RMSNorm`."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.fill_in_extra_state()

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dim."""
        return rms_norm(x, self.weight, self.eps)


class ColumnLinear(ExtraState, ColumnParallelLinear):
    """`TEColumnParallelLinear`."""


class RowLinear(ExtraState, RowParallelLinear):
    """`TERowParallelLinear`."""


class NormColumnLinear(ColumnLinear):
    """`TELayerNormColumnParallelLinear`: RMSNorm of the local sequence shard, then the product."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        # Transformer Engine registers the norm first, and optimizer state follows the order.
        weight = self._parameters.pop("weight")
        norm = nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        # Each TP rank sees its own part of the sequence: finalize_model_grads sums over TP.
        norm.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.layer_norm_weight = norm
        self.weight = weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Returns the product and no bias, as Megatron-Core's linears do."""
        output: tuple[Tensor, Tensor | None] = super().forward(
            rms_norm(x, self.layer_norm_weight, self.eps), *args, **kwargs
        )
        return output


class DuplicatedLinear(ExtraState, nn.Module):
    """`TELinear(parallel_mode="duplicated")`: the whole weight on every TP rank.

    Megatron-Core's local MLA gathers a split projection instead, and then loses the part of its
    gradient that comes from the shared rotary key (1% off).
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str,
        config: TransformerConfig,
        init_method: InitMethod,
        bias: bool,
        **_: object,
    ) -> None:
        super().__init__()
        assert parallel_mode == "duplicated"
        assert not bias
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        if config.perform_initialization:
            init_method(self.weight)
        marks = {
            "sequence_parallel": config.sequence_parallel,
            "allreduce": True,
            "tensor_model_parallel": False,
            "partition_dim": 0,
        }
        _mark(self.weight, marks)
        self.fill_in_extra_state()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Returns the product and no bias."""
        return F.linear(x, self.weight), None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """The weight as a tensor that every TP rank holds whole."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )


class GroupedLinear(ExtraState, nn.Module):
    """`TEGroupedLinear`: `weight0` .. `weight{n-1}`; the token dispatcher communicates."""

    split_dim: int

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: InitMethod,
        bias: bool,
        is_expert: bool,
        pg_collection: Any,
        **_: object,
    ) -> None:
        super().__init__()
        assert is_expert
        assert not bias
        self.num_gemms, self.groups = num_gemms, pg_collection
        shape = [output_size, input_size]
        shape[self.split_dim] //= pg_collection.expt_tp.size()
        # Experts are reduced over another group than the rest as soon as they are spread otherwise.
        own_group = (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        marks = {
            "allreduce": not own_group,
            "tensor_model_parallel": True,
            "partition_dim": self.split_dim,
            "partition_stride": 1,
        }
        for index in range(num_gemms):
            weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            if config.perform_initialization:
                with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                    init_method(weight)
            _mark(weight, marks)
            self.register_parameter(f"weight{index}", weight)
        self._register_load_state_dict_pre_hook(self._drop_numbered_extra_states)
        self.fill_in_extra_state()

    def _drop_numbered_extra_states(self, state: dict[str, Any], prefix: str, *_: object) -> None:
        for index in range(1, self.num_gemms):  # these exist in sharded state dicts only
            state.pop(f"{prefix}_extra_state{index}", None)

    def forward(self, x: Tensor, splits: Sequence[int]) -> tuple[Tensor, None]:
        """Applies expert i to the i-th of `splits` consecutive rows of `x` [tokens, features]."""
        rows = x.split(list(splits))
        products = [F.linear(row, getattr(self, f"weight{i}")) for i, row in enumerate(rows)]
        return torch.cat(products), None

    def backward_dw(self) -> None:
        """Weight gradients are never delayed here."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """All experts of all ranks as one global tensor [experts, ...]."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        single = metadata.get("singleton_local_shards", False)
        first, total = (
            self.groups.ep.rank() * self.num_gemms,
            self.groups.ep.size() * self.num_gemms,
        )
        result: ShardedStateDict = {}
        for index in range(self.num_gemms):
            expert = (len(sharded_offsets), first + index, total)
            weight, extra = f"{index}.weight", f"{index}._extra_state"
            shards = make_sharded_tensors_for_checkpoint(
                {weight: getattr(self, f"weight{index}"), extra: self.get_extra_state()},
                "",
                {weight: self.split_dim},
                sharded_offsets if single else (*sharded_offsets, expert),
                tp_group=self.groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            replace_prefix_for_sharding(
                shards, f"{index}.", f"{first + index}.{prefix}" if single else prefix
            )
            result[f"{prefix}weight{index}"] = shards[weight]
            result[f"{prefix}_extra_state{index or ''}"] = shards[extra]
        for shard in result.values():
            shard.replica_id = (*shard.replica_id[:2], self.groups.expt_dp.rank())
        return result


class GroupedColumnLinear(GroupedLinear):
    """`TEColumnParallelGroupedLinear`."""

    split_dim = 0


class GroupedRowLinear(GroupedLinear):
    """`TERowParallelGroupedLinear`."""

    split_dim = 1


def _mark(parameter: nn.Parameter, marks: Mapping[str, Any]) -> None:
    for name, value in marks.items():
        setattr(parameter, name, value)
