"""Start and stop the process groups of a layout; this process's place in it, as a record."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_dsv3.config.parallel import Parallel

PATIENCE = timedelta(days=1)
"""How long ranks wait for what rank 0 does alone; where it dies they end at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Where this process stands. All sizes and ranks are fixed once the groups exist."""

    rank: int
    world_size: int
    device: torch.device
    tp_rank: int
    pp_rank: int
    ep_rank: int
    etp_rank: int
    cp_rank: int
    dp_rank: int
    """Among the data-parallel replicas; ranks that share a sequence by CP have one dp_rank."""
    dp_size: int
    edp_rank: int
    """Among the replicas of this rank's experts."""
    collection: ProcessGroupCollection
    """The communicators, under Megatron-Core's names."""


class SharedError(ValueError):
    """An error that every rank raises alike, so one of them can speak for all."""


class RankError(ValueError):
    """An error that this rank alone met; its message says which rank."""


def raise_together(problem: str) -> None:
    """Collective. Raises on every rank what any rank met; "" is no problem.

    A rank that stopped alone would leave the others hanging in their next collective.
    """
    problems: list[str] = [problem] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(problems):
        if text:
            ranks.setdefault(text, []).append(rank)
    if ranks:
        whose = {
            text: "" if len(r) == len(problems) else f" (ranks {r})" for text, r in ranks.items()
        }
        raise SharedError("; ".join(text + whose[text] for text in ranks))


def from_rank_0[T](work: Callable[[], T]) -> T:
    """Collective. What `work` gives on rank 0, on every rank; the others wait as long as it takes.

    Raises:
        SharedError: On every rank, what went wrong on rank 0.
    """
    found: list[Any] = [None, ""]
    if dist.get_rank() == 0:
        try:
            found[0] = work()
        except (ValueError, OSError) as error:
            found[1] = str(error)
    # Not the default group: its patience is minutes.
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        dist.broadcast_object_list(found, src=0, group=group)
    finally:
        dist.destroy_process_group(group)
    if found[1]:
        raise SharedError(found[1])
    result: T = found[0]
    return result


def device_of(name: str) -> torch.device:
    """`auto`, `cuda` or `cpu` -> this process's device.

    Raises:
        ValueError: CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: no CUDA device is visible; set train.device=cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def start(
    parallel: Parallel, device: torch.device, *, seed: int = 1234, mtp_stage: int | None = None
) -> Groups:
    """Joins the job's processes (torchrun's environment, or this one alone) and seeds them.

    Args:
        parallel: The layout.
        device: Where this process computes.
        seed: Of everything random.
        mtp_stage: Pipeline rank that holds the MTP layers; None: the last one.

    Raises:
        ValueError: The world size does not fit the layout; all factors are shown.
    """
    if not dist.is_initialized():
        _join(device)
    world_size = dist.get_world_size()
    try:
        dp_size = parallel.dp_size(world_size)
        parallel.edp_size(world_size)
    except ValueError:
        stop()
        raise
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp_size,
        pipeline_model_parallel_size=parallel.pp_size,
        virtual_pipeline_model_parallel_size=parallel.vpp_size if parallel.vpp_size > 1 else None,
        context_parallel_size=parallel.cp_size,
        expert_model_parallel_size=parallel.ep_size,
        expert_tensor_parallel_size=parallel.etp_size,
        num_distributed_optimizer_instances=parallel.num_optimizer_instances,
        create_gloo_process_groups=dist.get_backend() != "fake",
        **_embedding_ranks(parallel, mtp_stage),
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Groups(
        rank=dist.get_rank(),
        world_size=world_size,
        device=device,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=dp_size,
        edp_rank=parallel_state.get_expert_data_parallel_rank(),
        collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def stop() -> None:
    """Leaves all groups; safe to call when none were started."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def leave_layout() -> None:
    """Collective: ends a layout's groups; the processes stay joined and may start another.

    Megatron-Core only forgets its groups; their threads and connections would stay.
    """
    mine = parallel_state._global_process_group_list or []  # there is no public list
    groups = [group for group in dict.fromkeys(mine) if group is not None]
    dist.barrier()  # nobody is left in one of them
    for group in groups:
        dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def _embedding_ranks(parallel: Parallel, mtp_stage: int | None) -> dict[str, Any]:
    """MTP embeds too, but by default the embedding's gradient is summed over the ends only."""
    if mtp_stage is None or mtp_stage == parallel.pp_size - 1:
        return {}
    return {"get_embedding_ranks": lambda ranks, *_: sorted({ranks[0], ranks[mtp_stage]})}


def _join(device: torch.device) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend)
        return
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
