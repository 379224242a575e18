"""Speed and memory of the offline converter, beside `cp` + `sync` of the same bytes in one run.

    python benchmarks/convert.py --work DIR [--only fp8-to-megatron] [--workers 1 2] [--keep]

Tensors have the 671B's own shapes: a dense layer, a layer of experts and an MTP block, with fewer
experts. DIR takes 50 GB on the disk to be measured and is deleted afterwards. Neither the converter
nor `cp` finds its source in the page cache: a checkpoint of 671B is larger than any.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_dsv3.config.architecture import DEEPSEEK_V3
from megatron_dsv3.convert.fp8 import SCALE_SUFFIX, scale_shape
from megatron_dsv3.convert.mapping import by_hf_name, exported_copies
from megatron_dsv3.convert.safetensors_file import SafetensorsWriter, TensorInfo

ARCH = replace(DEEPSEEK_V3, num_layers=2, num_dense_layers=1, num_experts=32)
TOOL = Path(__file__).resolve().parents[1] / "tools" / "checkpoint" / "convert.py"
NUM_FILES = 4
V3_BYTES = {"fp8-to-megatron": 1365e9, "megatron-to-bf16": 1369e9, "megatron-to-fp8": 689e9}
"""Of the output for the 671B with MTP."""
DIRECTIONS: dict[str, tuple[str, str, Sequence[str]]] = {
    "fp8-to-megatron": ("fp8", "mcore", ("--to", "megatron")),
    "megatron-to-bf16": ("mcore", "bf16", ("--to", "hf", "--dtype", "bf16")),
    "megatron-to-fp8": ("mcore", "fp8-again", ("--to", "hf", "--dtype", "fp8")),
}
"""Source, target and options; the first one's target is the others' source."""


@dataclass(frozen=True)
class Timing:
    """What the tool said of one conversion, and the peer's time."""

    num_bytes: int
    seconds: float
    whole_seconds: float
    """From start to exit: imports, checks of the source and planning as well."""
    cpu_seconds: float
    """Of all its processes: what stays the same on a machine that has other work, too."""
    peak_gb: float
    copy_seconds: float


def make_source(directory: Path) -> None:
    """A Hugging Face directory in DeepSeek's FP8, of random numbers."""
    directory.mkdir(parents=True)
    table = by_hf_name(ARCH)
    shapes = {name: param.hf_shape for name, param in table.items()}
    shapes |= {copy: shapes[original] for copy, original in exported_copies(ARCH).items()}
    infos: dict[str, TensorInfo] = {}
    for name, shape in shapes.items():
        if name in table and table[name].quantised:
            infos[name] = TensorInfo(torch.float8_e4m3fn, shape)
            infos[name + SCALE_SUFFIX] = TensorInfo(torch.float32, scale_shape(shape))
        else:
            is_bias = name in table and table[name].is_buffer
            infos[name] = TensorInfo(torch.float32 if is_bias else torch.bfloat16, shape)
    # Below 0x7F: no NaN. Read as bf16 these bytes are finite, too.
    noise = torch.randint(0, 0x7F, (max(info.nbytes for info in infos.values()),))
    noise = noise.to(torch.uint8)
    where = {}
    for number in range(NUM_FILES):
        file = f"model-{number + 1:05}-of-{NUM_FILES:05}.safetensors"
        part = {name: info for name, info in infos.items() if file_of(name) == number}
        where |= dict.fromkeys(part, file)
        with SafetensorsWriter(directory / file, part) as writer:
            for name, info in part.items():
                tensor = noise[: info.nbytes].view(info.dtype).view(info.shape)
                scale = name.endswith(SCALE_SUFFIX)
                writer.write(name, torch.full(info.shape, 1e-4) if scale else tensor)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (directory / "config.json").write_text(json.dumps(ARCH.to_hf(fp8=True)))


def file_of(name: str) -> int:
    """Which file holds a tensor; its scales are in the same one."""
    return sum(name.removesuffix(SCALE_SUFFIX).encode()) % NUM_FILES


def measure(work: Path, direction: str, workers: int) -> Timing:
    """Converts, then copies what was written."""
    source, target, options = DIRECTIONS[direction]
    out = work / target
    shutil.rmtree(out, ignore_errors=True)
    evict(work / source)
    command = [sys.executable, "-W", "ignore", str(TOOL), *options, "--from", str(work / source)]
    command += ["--out", str(out), "--workers", str(workers)]
    began, began_cpu = time.perf_counter(), children_cpu_seconds()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    whole, cpu = time.perf_counter() - began, children_cpu_seconds() - began_cpu
    if done.returncode:
        raise SystemExit(done.stderr)
    said = re.search(r"([\d,]+) bytes in (\d+) s .* at most ([\d.]+) GB", done.stdout)
    assert said is not None, done.stdout
    copied = copy_seconds(out, work / "copy")
    num_bytes = sum(file.stat().st_size for file in out.iterdir())
    return Timing(num_bytes, float(said[2]), whole, cpu, float(said[3]), copied)


def evict(directory: Path) -> None:
    """Takes a directory's files out of the page cache."""
    subprocess.run(["sync"], check=True)
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def children_cpu_seconds() -> float:
    """Of all processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def copy_seconds(source: Path, target: Path) -> float:
    """Time of `cp` and `sync`."""
    shutil.rmtree(target, ignore_errors=True)
    evict(source)
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync"], check=True)
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def main() -> None:
    """Prints one line for each direction and number of workers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", choices=list(DIRECTIONS), nargs="*", default=list(DIRECTIONS))
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--keep", action="store_true", help="leave the files for another run")
    arguments = parser.parse_args()
    work = arguments.work
    if not (work / "fp8").exists():
        make_source(work / "fp8")
    print(
        "direction         workers  GB   s    all s  cpu s  GB/s  cp+sync s  ratio  peak GB  671B h"
    )
    for direction in arguments.only:
        for workers in arguments.workers:
            t = measure(work, direction, workers)
            hours = t.seconds * V3_BYTES[direction] / t.num_bytes / 3600
            print(
                f"{direction:17} {workers:7} {t.num_bytes / 1e9:5.1f} {t.seconds:5.0f} "
                f"{t.whole_seconds:6.0f} {t.cpu_seconds:6.0f} {t.num_bytes / 1e9 / t.seconds:5.2f} "
                f"{t.copy_seconds:10.0f} {t.seconds / t.copy_seconds:6.2f} {t.peak_gb:8.2f} "
                f"{hours:7.1f}",
                flush=True,
            )
    if not arguments.keep:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
