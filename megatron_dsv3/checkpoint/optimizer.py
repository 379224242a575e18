"""The distributed optimizer's masters and moments, as whole tensors of the model's own shapes.

Megatron-Core's `fully_reshardable` format: any layout loads it. Its common part (steps, rates) is
nested by how many optimizers a rank chains, which depends on the layout; here that is undone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import param_group_identifier_keys

SHARDING = "fully_reshardable"


def optimizer_state(
    optimizer: Any, models: Mapping[str, Any], metadata: Mapping[str, Any]
) -> dict[Any, Any]:
    """Collective. What to save, in Megatron-Core's structure.

    Where a rank alone holds its parameters' states (experts that are not replicated: nearly all of
    a large model) they are taken as they are; Megatron-Core would copy them six times over to
    gather them from one rank.

    Args:
        optimizer: A chain of distributed optimizers.
        models: Sharded states of this rank's chunks.
        metadata: As Megatron-Core's own `sharded_state_dict` takes it.
    """
    parts = _parts(optimizer)
    if len(parts) > 1:
        optimizer._synchronize_steps()
    states = [
        _whole_state(part, models)
        if part.data_parallel_group.size() == 1
        else part.sharded_state_dict(models, metadata=dict(metadata))
        for part in parts
    ]
    return states[0] if len(states) == 1 else dict(enumerate(states))


def _whole_state(part: Any, models: Mapping[str, Any]) -> dict[str, Any]:
    """Of an optimizer that shares its parameters with no other rank."""
    sharded = {id(base.data): base for base in nested_values(dict(models)) if hasattr(base, "data")}
    states: dict[int, Any] = {}
    for buffer in part.buffers:
        for parameter in buffer.param_index_map:
            model = sharded[id(parameter)]
            tensors = part._get_main_param_and_optimizer_states(parameter)
            states[len(states)] = {
                name: _like(model, name, tensor)
                for name, tensor in tensors.items()
                if name == "param" or name in part.optimizer_state_keys
            }
    return {**part.state_dict(), "param_state": states, "param_state_sharding_type": SHARDING}


def _like(model: Any, name: str, flat: torch.Tensor) -> Any:
    """A parameter's place in the whole model, with a state of it in its stead."""
    tensor = flat.detach().float().view(model.data.shape)
    changes = {"key": f"optimizer.state.{name}.{model.key}", "data": tensor}
    if isinstance(model, ShardedTensorFactory):
        return replace(model, **changes)
    return replace(model, **changes, dtype=tensor.dtype)


def _parts(optimizer: Any) -> Sequence[Any]:
    """A dense one, and one for experts where those are spread over ranks of their own."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def param_states(
    optimizer: Any, models: Mapping[str, Any], metadata: Mapping[str, Any]
) -> dict[int, Any]:
    """What to load, in a structure of our own: the saved one depends on the number of parts."""
    return {
        index: part.sharded_state_dict(models, is_loading=True, metadata=dict(metadata))[
            "param_state"
        ]
        for index, part in enumerate(_parts(optimizer))
    }


def restore_optimizer(
    optimizer: Any, common: Mapping[str, Any], param_states: Mapping[int, Any]
) -> None:
    """Puts steps, rates and loaded tensors into the optimizers of this rank.

    Args:
        optimizer: A chain of distributed optimizers.
        common: Of the checkpoint.
        param_states: As `param_states` asked for it, loaded.

    Raises:
        ValueError: A parameter group has no saved one of its kind.
    """
    groups = _saved_groups(common["optimizer"])
    for index, part in enumerate(_parts(optimizer)):
        current = part.state_dict()["optimizer"]["param_groups"]
        part.load_state_dict(
            {
                "optimizer": {"param_groups": [_match(group, groups) for group in current]},
                "param_state": param_states[index],
                "param_state_sharding_type": SHARDING,
            }
        )


def _saved_groups(saved: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """Of all parts: `{"optimizer": ...}` where there was one, `{0: {"optimizer": ...}, ...}`."""
    parts = [saved] if "optimizer" in saved else list(saved.values())
    return [group for part in parts for group in part["optimizer"]["param_groups"]]


def _match(current: Mapping[str, Any], saved: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The saved group of this one's kind; experts may have been in a part of their own or not."""
    kind = {key: current.get(key) for key in param_group_identifier_keys}

    def differences(group: Mapping[str, Any]) -> list[str]:
        return [key for key, value in kind.items() if group.get(key) != value]

    best = min(saved, key=lambda group: len(differences(group)))
    if others := set(differences(best)) - {"is_expert_parallel"}:
        values = ", ".join(f"{k} is {kind[k]}, saved {best.get(k)}" for k in sorted(others))
        raise ValueError(f"no saved parameter group fits: {values}")
    present = {key: value for key, value in kind.items() if key in current}
    return {**best, **present}
