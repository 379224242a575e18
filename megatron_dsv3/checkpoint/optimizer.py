"""The distributed optimizer's masters and moments, as tensors of the model's own shapes.

Megatron-Core's `fully_reshardable` format: any layout loads it. Megatron-Core gathers each tensor
on one of the ranks that share it, through host memory and six times over, while training stands
still, and loads it whole on all of them; here each rank saves and loads its range of it, which is a
few boxes. The common part (steps, rates) is nested by how many optimizers a rank chains, which
depends on the layout; here that is undone.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import param_group_identifier_keys
from torch import Tensor

SHARDING = "fully_reshardable"


def optimizer_state(optimizer: Any, models: Mapping[str, Any]) -> dict[Any, Any]:
    """Collective. What to save, in Megatron-Core's structure; tensors of a GPU come to the host.

    Args:
        optimizer: A chain of distributed optimizers.
        models: Sharded states of this rank's chunks.
    """
    parts = _parts(optimizer)
    if len(parts) > 1:
        optimizer._synchronize_steps()
    states = [_state(part, models) for part in parts]
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()  # until all have come
    return states[0] if len(states) == 1 else dict(enumerate(states))


def _state(part: Any, models: Mapping[str, Any]) -> dict[str, Any]:
    """Of one optimizer; its tensors are numbered, as only their keys matter."""
    sharded = _by_parameter(models)
    is_shared = part.data_parallel_group.size() > 1
    states: dict[int, Any] = {}
    for parameter in part.model_param_gbuf_map:
        tensors = part._get_main_param_and_optimizer_states(parameter)
        for name, tensor in tensors.items():
            if name == "param" or name in part.optimizer_state_keys:
                whole = _like(sharded[id(parameter)], name)
                own = part._get_model_param_range_map(parameter)["param"]
                pieces = (
                    _pieces(whole, tensor, own.start, part.distributed_optimizer_instance_id)
                    if is_shared
                    else [replace(whole, data=_on_host(tensor).view(whole.data.shape))]
                )
                states.update(enumerate(({name: piece} for piece in pieces), len(states)))
    return {**part.state_dict(), "param_state": states, "param_state_sharding_type": SHARDING}


def _by_parameter(models: Mapping[str, Any]) -> dict[int, Any]:
    """Places in the whole model by the `id` of this rank's parameter."""
    return {id(base.data): base for base in nested_values(dict(models)) if hasattr(base, "data")}


def _like(model: Any, name: str) -> Any:
    """A parameter's place in the whole model, for a state of it."""
    data = torch.empty(model.data.shape, dtype=torch.float32, device="meta")
    changes = {"key": f"optimizer.state.{name}.{model.key}", "data": data}
    if isinstance(model, ShardedTensorFactory):
        return replace(model, **changes)
    return replace(model, **changes, dtype=data.dtype)


def _on_host(tensor: Tensor) -> Tensor:
    """In fp32; one at a time, as all of them in fp32 may not fit on a GPU beside the model."""
    return tensor.detach().float().to("cpu", non_blocking=True)


def _pieces(whole: Any, flat: Tensor, start: int, instance: int) -> Iterator[ShardedTensor]:
    """This rank's range of a parameter as boxes of the whole model's tensors.

    Args:
        whole: The parameter's place, on the meta device: a tensor, or what makes several of it
            (gate and up projection).
        flat: From `start` of the flat parameter on.
        start: As said.
        instance: Of the distributed optimizer; all but the first save nothing.
    """
    made = whole.build() if isinstance(whole, ShardedTensorFactory) else {0: whole}
    for tensor in nested_values(made):
        first = tensor.data.storage_offset()
        low, high = max(start, first), min(start + len(flat), first + tensor.data.numel())
        num_leading = len(tensor.global_offset) - len(tensor.local_shape)
        shape = (1,) * num_leading + tuple(tensor.local_shape)
        for offsets, sizes in boxes(shape, low - first, high - first):
            count = math.prod(sizes)
            yield replace(
                tensor,
                data=_on_host(flat[low - start : low - start + count]).view(sizes),
                local_shape=sizes,
                global_offset=tuple(map(sum, zip(tensor.global_offset, offsets, strict=True))),
                axis_fragmentations=None,  # no grid
                prepend_axis_num=0,
                replica_id=(*tensor.replica_id[:-1], instance),
            )
            low += count


def boxes(
    shape: Sequence[int], low: int, high: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of the boxes that hold `low` to `high` of a flat tensor, in order.

    At most two of each dimension but the first, and one.
    """
    if low >= high:
        return
    if len(shape) < 2:
        yield (low,), (high - low,)
        return
    row = math.prod(shape[1:])
    first, last = -(-low // row), high // row  # whole rows
    if low < first * row:
        before = (first - 1) * row
        for offsets, sizes in boxes(shape[1:], low - before, min(high - before, row)):
            yield (first - 1, *offsets), (1, *sizes)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    if first <= last:
        for offsets, sizes in boxes(shape[1:], 0, high - last * row):
            yield (last, *offsets), (1, *sizes)


def _parts(optimizer: Any) -> Sequence[Any]:
    """A dense one, and one for experts where those are spread over ranks of their own."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def param_states(optimizer: Any, models: Mapping[str, Any]) -> dict[int, Any]:
    """What to load: part -> parameter -> name of a state -> boxes, of this rank's ranges alone.

    Megatron-Core asks for each parameter whole, on every rank that has a range of it.

    Args:
        optimizer: A chain of distributed optimizers.
        models: Sharded states of this rank's chunks.
    """
    return {index: _wanted(part, models) for index, part in enumerate(_parts(optimizer))}


def _wanted(part: Any, models: Mapping[str, Any]) -> dict[int, dict[str, dict[int, Any]]]:
    sharded = _by_parameter(models)
    names = ("param", *part.optimizer_state_keys)
    wanted: dict[int, dict[str, dict[int, Any]]] = {}
    for number, parameter in enumerate(part.model_param_gbuf_map):
        own = part._get_model_param_range_map(parameter)["param"]
        for name in names:
            whole = _like(sharded[id(parameter)], name)
            pieces = _pieces(whole, torch.empty(len(own)), own.start, instance=0)
            wanted.setdefault(number, {})[name] = dict(enumerate(pieces))
    return wanted


def restore_optimizer(
    optimizer: Any, common: Mapping[str, Any], param_states: Mapping[int, Any]
) -> None:
    """Puts steps, rates and loaded tensors into the optimizers of this rank.

    Args:
        optimizer: A chain of distributed optimizers.
        common: Of the checkpoint.
        param_states: As `param_states` asked for it, loaded; emptied on the way.

    Raises:
        ValueError: A parameter group has no saved one of its kind.
    """
    groups = _saved_groups(common["optimizer"])
    for index, part in enumerate(_parts(optimizer)):
        current = part.state_dict()["optimizer"]["param_groups"]
        matched = [_match(group, groups) for group in current]
        part.load_state_dict({"optimizer": {"param_groups": matched}})
        for number, parameter in enumerate(part.model_param_gbuf_map):
            states = param_states[index].pop(number)
            part._set_main_param_and_optimizer_states(
                parameter, {name: _joined(pieces) for name, pieces in states.items()}
            )
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            part.optimizer._sync_hdo_state_to_sub_optimizers()


def _joined(pieces: Mapping[int, Tensor]) -> Tensor:
    """The flat range that `_pieces` made them of."""
    return torch.cat([pieces[number].flatten() for number in range(len(pieces))])


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
