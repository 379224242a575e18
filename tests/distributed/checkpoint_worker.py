"""Saves in one layout and goes on in others, all in one torchrun launch; writes what came of it.

    torchrun --nproc-per-node 4 checkpoint_worker.py HF_DIR OUT

OUT/results.json: name -> what `test_checkpoints.py` asserts on. The first part of a name is what
was done, the second the layout.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from tiny_engine import (
    NUM_STEPS,
    differences,
    make_engine,
    make_job,
    optimizer_state,
    train_step,
    weights,
)

from megatron_dsv3.checkpoint.saver import Saver
from megatron_dsv3.checkpoint.store import load
from megatron_dsv3.commands.assemble import Engine
from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.job import Job
from megatron_dsv3.config.placement import mtp_stage, place
from megatron_dsv3.model import cpu
from megatron_dsv3.model.groups import Groups, leave_layout, start, stop

SAVED_AFTER = 3
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
SAME: dict[str, dict[str, Any]] = {
    "tp2_ep2": {"parallel": {"tp_size": 2, "ep_size": 2}},
    "ep4_bf16_overlap": {
        "parallel": {"ep_size": 4},
        "precision": {"compute": "bf16"},
        "optimizer": OVERLAP,
    },
    "pp2_vpp2_ep2": {"parallel": {"pp_size": 2, "vpp_size": 2, "ep_size": 2}},
    "dp4_two_instances": {"parallel": {"num_optimizer_instances": 2}},
}
"""Saved and continued in the same layout: bit for bit."""
OTHERS: dict[str, dict[str, Any]] = {
    "dp4": {"parallel": {}},
    "cp2_ep2": {"parallel": {"cp_size": 2, "ep_size": 2}},
    "tp2_pp2": {"parallel": {"tp_size": 2, "pp_size": 2}},
}
"""Continue what tp2_ep2 saved; data-parallel sizes 4, 2 and 1."""


def in_layout(job: Job, do: Callable[[Groups], Any]) -> Any:
    """Runs in the process groups of a job's layout, which end with it."""
    arch = Architecture.from_hf(job.model.hf_dir)
    mtp = mtp_stage(place(arch, job.parallel))
    groups = start(job.parallel, torch.device("cpu"), seed=7, mtp_stage=mtp)
    result = do(groups)
    leave_layout()
    return result


def gathered(*_: object, **__: object) -> None:
    """Megatron-Core's way to a state that ranks share, in the place of which each saves its own."""
    raise AssertionError("states were gathered")


def same_layout(job: Job, folder: Path, groups: Groups) -> dict[str, Any]:
    whole = make_engine(job, groups)
    losses = [train_step(whole, n) for n in range(SAVED_AFTER)]
    told: list[str] = []
    saver = Saver(whole.trainee, folder, job.checkpoint, told.append)
    whole.step.settle()
    with mock.patch.object(DistributedOptimizer, "get_parameter_state_dp_zero", gathered):
        saver.save(SAVED_AFTER, {"step": whole.step.state()})
    losses += [train_step(whole, n) for n in range(SAVED_AFTER, NUM_STEPS)]
    saver.finish()
    rest = make_engine(job, groups, load=False)
    with mock.patch.object(DistributedOptimizer, "get_parameter_state_dp_zero", gathered):
        loaded = load(rest.trainee, folder / "iter_0000003")
    rest.step.restore(loaded.own["step"])
    again = [train_step(rest, n) for n in range(SAVED_AFTER, NUM_STEPS)]
    unequal = differences(weights(whole), weights(rest))
    unequal += differences(optimizer_state(whole), optimizer_state(rest))
    everyones: list[list[str]] = [[]] * groups.world_size
    dist.all_gather_object(everyones, unequal)
    names = [name for part in everyones for name in part]
    return {"losses": losses, "again": again, "unequal": names, "told": told}


def other_layout(job: Job, folder: Path, groups: Groups) -> dict[str, Any]:
    rest = make_engine(job, groups, load=False)
    loaded = load(rest.trainee, folder / "iter_0000003")
    rest.step.restore(loaded.own["step"])
    again = [train_step(rest, n) for n in range(SAVED_AFTER, NUM_STEPS)]
    return {"again": again, "exact_rng": loaded.exact_rng}


# ---- Megatron-Core's own save and load, as Megatron-LM calls them ------------------------------


def stock_state(engine: Engine, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    [chunk] = engine.bridge.chunks
    state = {"model": chunk.sharded_state_dict(metadata=metadata)}
    state["optimizer"] = engine.optimizer.sharded_state_dict(
        state, is_loading=is_loading, metadata=metadata
    )
    return state


def stock_save(job: Job, folder: Path, groups: Groups) -> list[float]:
    engine = make_engine(job, groups)
    for number in range(SAVED_AFTER):
        train_step(engine, number)
    state = stock_state(engine, is_loading=False)
    state |= {"iteration": SAVED_AFTER, "checkpoint_version": 3.0}
    state["opt_param_scheduler"] = engine.schedule.state_dict()
    if groups.rank == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, str(folder))
    return [train_step(engine, n) for n in range(SAVED_AFTER, NUM_STEPS)]


def ours_loads_stock(job: Job, folder: Path, groups: Groups) -> list[float]:
    engine = make_engine(job, groups, load=False)
    assert load(engine.trainee, folder).step == SAVED_AFTER
    return [train_step(engine, n) for n in range(SAVED_AFTER, NUM_STEPS)]


def stock_loads_ours(job: Job, folder: Path, groups: Groups) -> list[float]:
    engine = make_engine(job, groups, load=False)
    with torch.no_grad():
        state = dist_checkpointing.load(
            stock_state(engine, is_loading=True), str(folder), strict="log_all"
        )
        engine.bridge.chunks[0].load_state_dict(state["model"], strict=True)
        engine.optimizer.load_state_dict(state["optimizer"])
        engine.schedule.load_state_dict(state["opt_param_scheduler"])
    return [train_step(engine, n) for n in range(SAVED_AFTER, NUM_STEPS)]


def main() -> None:
    hf_dir, out = Path(sys.argv[1]), Path(sys.argv[2])
    cpu.enable()
    results: dict[str, Any] = {}

    def run(name: str, do: Callable[..., Any], folder: Path, sections: dict[str, Any]) -> None:
        job = make_job(hf_dir, **sections)
        try:
            results[name] = in_layout(job, lambda groups: do(job, folder, groups))
        except Exception as error:
            error.add_note(f"in {name}")
            raise

    for layout, sections in SAME.items():
        run(f"same {layout}", same_layout, out / layout, sections)
    for layout, sections in OTHERS.items():
        run(f"other {layout}", other_layout, out / "tp2_ep2", sections)
    stock = out / "stock" / "iter_0000003"
    run("stock saves", stock_save, stock, OTHERS["tp2_pp2"])
    run("ours loads stock", ours_loads_stock, stock, SAME["tp2_ep2"])
    # Two chained optimizers in both layouts: Megatron-Core itself cannot change their number.
    ours = out / "tp2_ep2" / "iter_0000003"
    run("stock loads ours", stock_loads_ours, ours, {"parallel": {"ep_size": 4}})
    if dist.get_rank() == 0:
        (out / "results.json").write_text(json.dumps(results))
    stop()


if __name__ == "__main__":
    main()
