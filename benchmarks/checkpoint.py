"""How long training stands still for a save, and how fast its bytes reach the disk.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py [--hidden 1024] [--repeats 3] [--dir DIR]
    torchrun --nproc-per-node 2 benchmarks/checkpoint.py ...

A small model trained in earnest on the CPU. Asynchronous against synchronous saves of the same
state, and both against `cp` of the same files with a sync; the order changes from round to round.
Several processes are data parallel: of these also, how long it takes to make ready what each of
them saves of the optimizer, against Megatron-Core's `fully_reshardable`, which gathers it, and to
load it, where Megatron-Core reads all of it on each.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_dsv3.checkpoint.optimizer import SHARDING, optimizer_state, param_states
from megatron_dsv3.checkpoint.saver import Saver
from megatron_dsv3.checkpoint.store import load
from megatron_dsv3.commands.assemble import Engine, build_engine, build_model
from megatron_dsv3.config.architecture import DEEPSEEK_V3, Architecture
from megatron_dsv3.config.job import Job
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import CheckpointSection
from megatron_dsv3.data.batch import Batch, make_batch
from megatron_dsv3.data.store import Sample
from megatron_dsv3.model import cpu
from megatron_dsv3.model.groups import Groups, start, stop

LENGTH = 64


def architecture(hidden: int) -> Architecture:
    """Four layers; nearly all parameters are experts', as in the 671B."""
    return replace(
        DEEPSEEK_V3,
        num_layers=4,
        num_dense_layers=1,
        num_mtp_layers=0,
        hidden_size=hidden,
        ffn_hidden_size=2 * hidden,
        moe_ffn_hidden_size=hidden // 2,
        num_experts=16,
        num_groups=4,
        num_groups_per_token=2,
        num_experts_per_token=4,
        num_heads=4,
        vocab_size=4096,
    )


def engine_of(arch: Architecture, groups: Groups) -> Engine:
    """Random weights."""
    job = Job.model_validate(
        {
            "model": {"hf_dir": "none"},
            "data": {"paths": ["none"], "seq_length": LENGTH},
            "train": {"global_batch_size": groups.world_size, "device": "cpu"},
            "precision": {"compute": "bf16"},
            "output": {"dir": "none"},
        }
    )
    bridge = build_model(job, arch, groups, checkpoint=arch)
    with torch.no_grad():
        for _, tensor in bridge.local_tensors():
            tensor.normal_(std=0.02)
    return build_engine(job, bridge, num_steps=1000)


def batch_of(arch: Architecture) -> Batch:
    """One document that fills the row."""
    tokens = torch.randint(0, arch.vocab_size, (LENGTH,), dtype=torch.int32)
    sample = Sample("random", tokens.numpy(), torch.ones(LENGTH, dtype=torch.bool).numpy())
    return make_batch([sample], seq_length=LENGTH, num_mtp=0, pad_id=0)


def timed_save(
    engine: Engine, batch: Batch, folder: Path, *, asynchronous: bool
) -> dict[str, float]:
    """Seconds that training stood still, until the checkpoint had its name, and of a step then."""
    section = CheckpointSection(asynchronous=asynchronous)
    saver = Saver(engine.trainee, folder, section, lambda _: None)
    os.sync()
    began = time.perf_counter()
    saver.save(1, {})
    still = time.perf_counter() - began
    steps = []
    while saver.last_saved is None or not steps:
        step_began = time.perf_counter()
        engine.step([batch])
        steps.append(time.perf_counter() - step_began)
        saver.poll()
    whole = time.perf_counter() - began
    saver.finish()
    return {"still": still, "whole": whole, "step": statistics.median(steps)}


def timed_copy(source: Path, target: Path) -> float:
    """Seconds of a plain copy of the same bytes to the same disk."""
    os.sync()
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", "-f", str(target)], check=True)
    return time.perf_counter() - began


def timed_gathering(engine: Engine) -> dict[str, float]:
    """Seconds until what this rank saves of the optimizer is there: ours, and Megatron-Core's."""
    (chunk,) = engine.trainee.chunks
    optimizer = engine.trainee.optimizer
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
    }
    times = {}
    for name in ("own states", "gathered states"):
        models = {"model": chunk.sharded_state_dict(metadata={"singleton_local_shards": False})}
        dist.barrier()
        began = time.perf_counter()
        with torch.no_grad():
            if name == "own states":
                optimizer_state(optimizer, models)
            else:
                optimizer.sharded_state_dict(models, metadata=metadata)
        dist.barrier()
        times[name] = time.perf_counter() - began
    return times


def timed_loading(engine: Engine, path: Path) -> dict[str, float]:
    """Seconds until weights and optimizer are loaded, and GB asked for: ours, Megatron-Core's."""
    (chunk,) = engine.trainee.chunks
    optimizer = engine.trainee.optimizer
    sharded = {"singleton_local_shards": False}
    metadata = {**sharded, "distrib_optim_sharding_type": SHARDING}
    models = {"model": chunk.sharded_state_dict(metadata=sharded)}
    wanted = {
        "own": param_states(optimizer, models),
        "whole": optimizer.sharded_state_dict(models, is_loading=True, metadata=metadata),
    }
    found = {f"{name} asked for": gigabytes_of(states) for name, states in wanted.items()}
    wanted.clear()
    dist.barrier()
    began = time.perf_counter()
    load(engine.trainee, path)
    dist.barrier()
    found["own loaded"] = time.perf_counter() - began
    began = time.perf_counter()
    with torch.no_grad():
        models["optimizer"] = optimizer.sharded_state_dict(
            models, is_loading=True, metadata=metadata
        )
        state = dist_checkpointing.load(models, str(path), strict="ignore_all")
        chunk.load_state_dict(state["model"], strict=True)
        optimizer.load_state_dict(state["optimizer"])
    dist.barrier()
    found["whole loaded"] = time.perf_counter() - began
    return found


def gigabytes_of(states: dict[Any, Any]) -> float:
    """Of all tensors asked for."""
    kinds = (ShardedTensor, ShardedTensorFactory)
    asked = (base for base in nested_values(states) if isinstance(base, kinds))
    return sum(base.data.nbytes for base in asked) / 1e9


def main() -> None:
    """Prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None, help="Where to write.")
    options = parser.parse_args()
    cpu.enable()
    groups = start(Parallel(), torch.device("cpu"))
    arch = architecture(options.hidden)
    engine, batch = engine_of(arch, groups), batch_of(arch)
    for _ in range(2):
        engine.step([batch])
    times: dict[str, list[float]] = defaultdict(list)
    size = 0
    for number in range(options.repeats):
        places = [Path(tempfile.mkdtemp(dir=options.dir))]
        dist.broadcast_object_list(places)
        (place,) = places
        for asynchronous in (True, False) if number % 2 else (False, True):
            name = "asynchronous" if asynchronous else "synchronous"
            found = timed_save(engine, batch, place / name, asynchronous=asynchronous)
            for key, value in found.items():
                times[f"{name} {key}"].append(value)
        saved = place / "synchronous" / "iter_0000001"
        if groups.world_size > 1:
            for key, value in (timed_gathering(engine) | timed_loading(engine, saved)).items():
                times[key].append(value)
        if groups.rank == 0:
            size = sum(file.stat().st_size for file in saved.iterdir())
            times["copy"].append(timed_copy(saved, place / "copy"))
            shutil.rmtree(place)
        dist.barrier()
    if groups.rank == 0:
        medians = {name: statistics.median(values) for name, values in times.items()}
        report(medians, size, groups.world_size)
    stop()


def report(medians: dict[str, float], size: int, num_ranks: int) -> None:
    """One line a kind of save."""
    gigabytes = size / 1e9
    print(f"torch {torch.__version__}, {num_ranks} ranks, {gigabytes:.2f} GB a checkpoint; medians")
    print(f"{'':14}{'still, s':>10}{'until saved, s':>16}{'GB/s':>8}{'step meanwhile, s':>20}")
    for name in ("asynchronous", "synchronous"):
        still, whole = medians[f"{name} still"], medians[f"{name} whole"]
        written = whole if name == "asynchronous" else still
        step = medians[f"{name} step"]
        print(f"{name:14}{still:10.2f}{written:16.2f}{gigabytes / written:8.2f}{step:20.2f}")
    print(f"{'cp and sync':14}{'':10}{medians['copy']:16.2f}{gigabytes / medians['copy']:8.2f}")
    ratio = medians["synchronous still"] / medians["asynchronous still"]
    print(f"training stands still {ratio:.1f} times longer for a synchronous save")
    if num_ranks > 1:
        own, gathered = medians["own states"], medians["gathered states"]
        print(
            f"what a rank saves of the optimizer is ready after {own:.2f} s; gathered by "
            f"Megatron-Core after {gathered:.2f} s"
        )
        print(
            f"rank 0 loads {medians['own asked for']:.2f} GB of the optimizer, all of it in "
            f"{medians['own loaded']:.2f} s; as Megatron-Core does {medians['whole asked for']:.2f}"
            f" GB in {medians['whole loaded']:.2f} s"
        )


if __name__ == "__main__":
    main()
