"""Model, optimizer and all that a run goes on from <-> one checkpoint of Megatron-Core's format.

Keys and shapes are those of the whole model, so any layout loads what any other has saved, and
stock Megatron-Core loads it too. What is this program's own stands under `OWN` in the common state.
"""

import random
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_dsv3.checkpoint.headers import read_metadata
from megatron_dsv3.checkpoint.optimizer import (
    SHARDING,
    optimizer_state,
    param_states,
    restore_optimizer,
)
from megatron_dsv3.checkpoint.writer import plan_save
from megatron_dsv3.model.groups import Groups, SharedError, raise_together

OWN = "megatron_dsv3"
_RNG = "rng_state"


@dataclass(frozen=True, slots=True)
class Trainee:
    """What is saved and restored, on this rank."""

    chunks: Sequence[Any]
    """Unwrapped models; wrappers would write their own prefix into the names."""
    optimizer: Any
    """Megatron-Core's chain of distributed optimizers."""
    schedule: Any
    groups: Groups


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a checkpoint says besides tensors."""

    step: int
    own: Mapping[str, Any]
    """What was given to `save`; empty where another program saved."""
    schedule: Mapping[str, Any]
    exact_rng: bool
    """Whether random states were restored; not in another layout."""


def request_save(
    trainee: Trainee, folder: Path, *, step: int, own: Mapping[str, Any]
) -> AsyncRequest:
    """Collective. The plan of a save; start it with `execute_sync`, or in a queue.

    Args:
        trainee: What to save. Weights must be gathered, not under way.
        folder: Of the run's checkpoints.
        step: Optimizer steps done.
        own: Plain values, equal on all ranks, which `load` gives back.

    Raises:
        SaveError: The folder cannot be written to.
    """
    metadata = _metadata(trainee.groups)
    models = _models(trainee, metadata)
    state: dict[str, Any] = {
        **models,
        "optimizer": optimizer_state(trainee.optimizer, models),
        "rng_state": _rng_object(trainee.groups, _rng_state(trainee.groups.device)),
        # The next four as Megatron-LM names them.
        "iteration": step,
        "checkpoint_version": 3.0,
        "opt_param_scheduler": trainee.schedule.state_dict(),
        OWN: {**own, "layout": _layout(trainee.groups)},
    }
    return plan_save(
        state, folder, step=step, groups=trainee.groups, content_metadata=_saved(metadata)
    )


def read_common(path: Path) -> dict[str, Any]:
    """The part of a checkpoint that is no tensor: `iteration`, `opt_param_scheduler`, `OWN`.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        common: dict[str, Any] = dist_checkpointing.serialization.load_common_state_dict(str(path))
    except Exception as error:  # torch and Megatron-Core raise whatever a damaged file leads to
        raise ValueError(f"{path}: the common state cannot be read: {error}") from None
    return common


def load(trainee: Trainee, path: Path, *, optimizer: bool = True) -> Loaded:
    """Collective. Fills model, optimizer and random states; the schedule goes to the saved step.

    Args:
        trainee: Of the same model, in any layout.
        path: One checkpoint directory.
        optimizer: Whether to load its state; without it, steps and random states start anew.

    Raises:
        ValueError: On every rank: tensors missing, surplus or of another shape, or unreadable ones.
    """
    problem, loaded = "", None
    try:
        loaded = _load(trainee, path, optimizer=optimizer)
    except SharedError:
        raise
    except Exception as error:  # whatever a damaged file leads to; the others must not wait
        place = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{path}: {type(error).__name__} in {place.name}: {error or place.line}"
    raise_together(problem)
    assert loaded is not None
    return loaded


@torch.no_grad()
def _load(trainee: Trainee, path: Path, *, optimizer: bool) -> Loaded:
    common = read_common(path)
    own = common.get(OWN, {})
    exact_rng = optimizer and own.get("layout") == _layout(trainee.groups)
    metadata = _metadata(trainee.groups)
    wanted: dict[str, Any] = _models(trainee, metadata)
    if optimizer:
        wanted["param_states"] = param_states(trainee.optimizer, dict(wanted))
    if exact_rng:
        wanted["rng_state"] = _rng_object(trainee.groups, {})
    names = [name for name in wanted if name.startswith("model")]
    raise_together(_missing(wanted, path))
    state, surplus, _ = dist_checkpointing.load(wanted, str(path), strict="return_all")
    _check_surplus(surplus, optimizer=optimizer)
    for name, chunk in zip(names, trainee.chunks, strict=True):
        chunk.load_state_dict(state[name], strict=True)
    if optimizer:
        restore_optimizer(trainee.optimizer, common, state["param_states"])
        trainee.schedule.step(increment=common["opt_param_scheduler"]["num_steps"])
    else:
        trainee.optimizer.reload_model_params()
    if exact_rng:
        _set_rng_state(state["rng_state"], trainee.groups.device)
    schedule = common.get("opt_param_scheduler", {})
    return Loaded(common.get("iteration", 0), own, schedule, exact_rng)


def _metadata(groups: Groups) -> dict[str, Any]:
    """How Megatron-Core makes sharded states."""
    return {
        "singleton_local_shards": False,
        "dp_cp_group": groups.collection.dp_cp,
        "distrib_optim_sharding_type": SHARDING,
        "chained_optim_avoid_prefix": True,
    }


def _saved(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if name != "dp_cp_group"}


def _models(trainee: Trainee, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`model`, or `model0`, `model1`, ... for virtual stages."""
    chunks = trainee.chunks
    names = ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]
    return {
        name: chunk.sharded_state_dict(metadata=dict(metadata))
        for name, chunk in zip(names, chunks, strict=True)
    }


def _layout(groups: Groups) -> list[int]:
    """Equal where rank n holds the same part of the same model."""
    sizes = groups.collection
    by = (sizes.tp, sizes.pp, sizes.cp, sizes.ep, sizes.expt_tp)
    return [groups.world_size, *(group.size() for group in by)]


# ---- Random states ------------------------------------------------------------------------------


def _rng_object(groups: Groups, state: Mapping[str, Any]) -> ShardedObject:
    return ShardedObject(_RNG, dict(state), (groups.world_size,), (groups.rank,))


def _rng_state(device: torch.device) -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).copy()), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if device.type == "cuda" else None,
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])


# ---- Names --------------------------------------------------------------------------------------


def _missing(wanted: Mapping[str, Any], path: Path) -> str:
    """What the file lacks of this rank's part, before any tensor is read; "" where it is all there.

    Megatron-Core would go on, and fail over the structure of what it has read.
    """
    try:
        stored = read_metadata(path).state_dict_metadata
    except ValueError as error:
        return str(error)
    names = {name.partition("/shard_")[0] for name in stored}
    lacking = {base.key for base in nested_values(dict(wanted))} - names
    if not lacking:
        return ""
    if not any(name.startswith("optimizer.") for name in names):
        return f"{path}: holds weights alone, no optimizer to go on with"
    return f"{path}: not a checkpoint of this model: lacks {_listed(lacking)}"


def _check_surplus(surplus: set[str], *, optimizer: bool) -> None:
    optional = (_RNG,) if optimizer else (_RNG, "optimizer.")
    if surplus := {name for name in surplus if not name.startswith(optional)}:
        raise ValueError(f"not a checkpoint of this model: holds {_listed(surplus)} besides it")


def _listed(names: set[str]) -> str:
    shown = sorted(names)
    more = f" and {len(shown) - 6} more" if len(shown) > 6 else ""
    return ", ".join(shown[:6]) + more
