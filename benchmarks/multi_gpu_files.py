"""A model's files over several GPUs: exporting and loading Hugging Face's, saving while it trains.

    torchrun --nproc-per-node 8 benchmarks/multi_gpu_files.py --dir DIR [--repeats 3] [--json FILE]

A slice of DeepSeek-V3 with its widths and eight experts on each GPU (on 8 GPUs 6.9 B parameters: 14
GB are exported, and 97 GB saved twice, one after the other; `--experts 2` makes that 38 for a slow
disk). Of export and load: GB/s and the most host memory that all ranks together took for it; of
asynchronous and synchronous saves: how long training stands still, and until the checkpoint is
there. Files are read from the disk, not from memory. `--smoke` does the same with tiny layers on
CPUs, to see that the script works.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoint import timed_save
from multi_gpu import SMALL, largest

from megatron_dsv3.commands.assemble import Engine, build_engine, build_model
from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.job import Job
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.convert.hf_io import HFReader, write_hf
from megatron_dsv3.model import cpu
from megatron_dsv3.model.groups import Groups, device_of, leave_layout, start, stop
from megatron_dsv3.train import bench

LENGTH = 4096


def main() -> None:
    """Prints the medians on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="where to write; on a real disk")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--experts", type=int, default=8, help="on each GPU")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--smoke", action="store_true", help="tiny layers on CPUs")
    arguments = parser.parse_args()
    if arguments.smoke:
        cpu.enable()
    device = device_of("cpu" if arguments.smoke else "cuda")
    start(Parallel(), device)
    leave_layout()
    parallel = Parallel(ep_size=dist.get_world_size())
    groups = start(parallel, device)
    arch = bench.slice_of_v3(num_experts=arguments.experts * groups.world_size)
    arch = replace(arch, **SMALL) if arguments.smoke else arch
    engine = engine_of(arch, parallel, groups, length=LENGTH // 64 if arguments.smoke else LENGTH)
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(arguments.repeats):
        for name, value in once(engine, arch, groups, arguments.dir).items():
            found[name].append(value)
    medians = {name: statistics.median(values) for name, values in found.items()}
    if groups.rank == 0:
        report(medians, groups.world_size)
        if arguments.json:
            arguments.json.write_text(json.dumps(medians, indent=1) + "\n")
    dist.barrier()
    stop()


def engine_of(arch: Architecture, parallel: Parallel, groups: Groups, *, length: int) -> Engine:
    """Random weights."""
    on_gpu = groups.device.type == "cuda"
    job = Job.model_validate(
        {
            "model": {"hf_dir": "none"},
            "data": {"paths": ["none"], "seq_length": length},
            "parallel": parallel.model_dump(),
            "train": {"global_batch_size": groups.dp_size, "device": groups.device.type},
            "optimizer": {"moments": "bf16" if on_gpu else "fp32"},
            "output": {"dir": "none"},
        }
    )
    bridge = build_model(job, arch, groups, checkpoint=arch)
    with torch.no_grad():
        for _, tensor in bridge.local_tensors():
            tensor.normal_(std=0.02)
    return build_engine(job, bridge, num_steps=1000)


def once(engine: Engine, arch: Architecture, groups: Groups, directory: Path) -> dict[str, float]:
    """Collective: one export, one load, one save of each kind; seconds, GB, GB of host memory."""
    place, bridge = directory / "multi_gpu_files", engine.bridge
    if groups.rank == 0:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    dist.barrier()

    def export() -> None:
        stream = bridge.export(dtype=torch.bfloat16)
        if groups.rank == 0:
            write_hf(stream, place / "hf", config=arch.to_hf(dtype="bfloat16"))
            os.sync()
        else:
            for _ in stream:
                pass
        dist.barrier()

    found = {}
    found["export s"], found["export host GB"] = watched(export, groups)
    size = sum(file.stat().st_size for file in (place / "hf").iterdir())
    forget(place / "hf")
    dist.barrier()
    found["load s"], found["load host GB"] = watched(
        lambda: bridge.load(HFReader(place / "hf")), groups
    )
    case = bench.Case(name="a step", arch=arch, document_length=engine_length(engine))
    (batch,) = bench.random_batches(case, seed=groups.dp_rank)
    engine.step([batch])
    for kind in ("asynchronous", "synchronous"):
        times = timed_save(engine, batch, place / kind, asynchronous=kind == "asynchronous")
        for name, seconds in times.items():
            found[f"{kind} {name} s"] = largest(seconds, groups.device)
        saved = place / kind / "iter_0000001"
        found["checkpoint GB"] = sum(file.stat().st_size for file in saved.iterdir()) / 1e9
        dist.barrier()
        if groups.rank == 0:  # a disk may have room for one
            shutil.rmtree(place / kind)
        dist.barrier()
    found["model GB"] = size / 1e9
    if groups.rank == 0:
        shutil.rmtree(place)
    return found


def engine_length(engine: Engine) -> int:
    """Tokens of a row."""
    length: int = engine.bridge.chunks[0].max_sequence_length
    return length


def watched(action: Callable[[], None], groups: Groups) -> tuple[float, float]:
    """Seconds of the slowest rank, and GB by which all ranks' memory rose at most."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    dist.barrier()
    began = time.perf_counter()
    action()
    seconds = time.perf_counter() - began
    rise = torch.tensor(resident("VmHWM") - before, device=groups.device)
    dist.all_reduce(rise)
    return largest(seconds, groups.device), float(rise)


def resident(what: str) -> float:
    """GB of this process, by its line in /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{what}:"))
    return int(kilobytes) * 1024 / 1e9


def forget(directory: Path) -> None:
    """Takes its files out of the page cache."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report(medians: dict[str, float], num_ranks: int) -> None:
    """One line each."""
    print(f"torch {torch.__version__}, {num_ranks} ranks; medians")
    for name in ("export", "load"):
        seconds = medians[f"{name} s"]
        print(
            f"{name:14}{seconds:8.2f} s {medians['model GB'] / seconds:7.2f} GB/s, "
            f"{medians[f'{name} host GB']:.2f} GB of host memory in all ranks together"
        )
    for kind in ("asynchronous", "synchronous"):
        still, whole = medians[f"{kind} still s"], medians[f"{kind} whole s"]
        print(
            f"{kind:14}{still:8.2f} s training stands still, {whole:.2f} s until saved, "
            f"{medians['checkpoint GB'] / whole:.2f} GB/s"
        )


if __name__ == "__main__":
    main()
