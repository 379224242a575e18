"""The training step over several GPUs: layouts, overlap, raw Megatron-Core, and the planner beside.

    torchrun --nproc-per-node 8 benchmarks/multi_gpu.py [--only NAME ...] [--steps 6] [--json FILE]

Slices of DeepSeek-V3 with its widths and 64 experts, for 2, 4 or 8 GPUs of one host. Of each case:
time of a step and tokens/s of a GPU, the largest peak of any rank, communication during which
nothing else ran on rank 0, and, at the end, what `megatron-dsv3 plan` projects. `--smoke` runs tiny
layers of the same layouts on CPUs, to see that the script works; its figures say nothing.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peers import mcore_plain

from megatron_dsv3.commands.bench import FP8, FULL, choose
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import ExpertsSection, OptimizerSection, PrecisionSection
from megatron_dsv3.model import cpu
from megatron_dsv3.model.groups import Groups, device_of, leave_layout, start, stop
from megatron_dsv3.plan.cards import cluster_of
from megatron_dsv3.plan.estimate import estimate
from megatron_dsv3.plan.kernels import load_kernels
from megatron_dsv3.plan.records import GIB, Workload, allocated
from megatron_dsv3.plan.speed import Speed
from megatron_dsv3.train import bench
from megatron_dsv3.train.bench import Case, Measured, Prepared, slice_of_v3
from megatron_dsv3.train.kernel_kinds import exposed, trace_step

ARCH = slice_of_v3(num_experts=64)
DEEP = slice_of_v3(num_layers=7, num_experts=64)
BF16_MOMENTS = OptimizerSection(moments="bf16")
OVERLAP = OptimizerSection(overlap_grad_reduce=True, overlap_param_gather=True)
SHARED = {"moe_shared_expert_overlap": True}
EXCHANGE = ExpertsSection(overlap_all_to_all=True)
CARDS = {"H100": "h100-80gb", "H200": "h200-141gb"}
SMALL: Mapping[str, Any] = {
    "hidden_size": 64, "ffn_hidden_size": 64, "moe_ffn_hidden_size": 32, "num_heads": 8,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "vocab_size": 256,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One case, measured and projected."""

    measured: Measured
    peak_gib: float
    """Of the fullest rank."""
    exposed_ms: float | None = None
    projected_ms: float | None = None
    projected_peak_gib: float | None = None


def cases(world_size: int) -> list[Case]:
    """For so many GPUs."""
    n = world_size
    spread = Parallel(ep_size=n)
    four: Mapping[str, Any] = {"arch": ARCH, "num_micro_batches": 4, "parallel": spread}
    return [
        Case(name=f"EP{n} bf16", **four),
        Case(name=f"EP{n} fp8", precision=FP8, **four),
        Case(name=f"EP{n} bf16, gradients and weights overlapped", optimizer=OVERLAP, **four),
        Case(name=f"EP{n} bf16, shared expert overlapped", options=SHARED, **four),
        Case(name=f"EP{n} bf16, all-to-alls overlapped", experts=EXCHANGE, **four),
        Case(name=f"EP{n} fp8, all-to-alls overlapped", experts=EXCHANGE, precision=FP8, **four),
        *(
            Case(name=f"TP{tp} EP{n} bf16", **{**four, "parallel": Parallel(tp_size=tp, ep_size=n)})
            for tp in sorted({2, n})
        ),
        *(
            Case(
                name=f"CP{n} EP{n} bf16 {length // 1024}k", arch=ARCH, document_length=length,
                parallel=Parallel(cp_size=n, ep_size=n), memory=FULL, optimizer=BF16_MOMENTS,
            )
            for length in (32768, 131072)
        ),
        *(
            Case(
                name=f"PP4 EP{n // 4} bf16", arch=DEEP, num_micro_batches=8,
                parallel=Parallel(pp_size=4, ep_size=n // 4), memory=FULL, optimizer=BF16_MOMENTS,
            )
            for _ in range(n % 4 == 0)
        ),
    ]  # fmt: skip


def peers(world_size: int) -> dict[str, tuple[Parallel, str | None]]:
    """Layout and precision of raw Megatron-Core, by name."""
    n = world_size
    return {
        f"mcore EP{n} bf16": (Parallel(ep_size=n), None),
        f"mcore EP{n} fp8": (Parallel(ep_size=n), "blockwise"),
        f"mcore TP2 EP{n} bf16": (Parallel(tp_size=2, ep_size=n), None),
    }


def main() -> None:
    """Prints one line a case on rank 0 as it is done, and writes all to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="names, `*` for any part of one")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--smoke", action="store_true", help="tiny layers on CPUs")
    arguments = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        parser.error("expected 2, 4 or 8 processes of torchrun; for one: `megatron-dsv3 bench`")
    if arguments.smoke:
        cpu.enable()
    device = device_of("cpu" if arguments.smoke else "cuda")
    start(Parallel(), device)
    leave_layout()
    world_size = dist.get_world_size()
    ours = {c.name: tiny(c) if arguments.smoke else c for c in cases(world_size)}
    theirs = {} if arguments.smoke else peers(world_size)
    rows = []
    for name in choose({**ours, **theirs}, arguments.only):
        parallel = ours[name].parallel if name in ours else theirs[name][0]
        groups = start(parallel, device)
        if name in ours:
            row = measure(ours[name], groups, arguments.steps)
        else:
            fp8 = theirs[name][1]
            got = mcore_plain.measure(groups, 4, fp8, arguments.steps, arch=ARCH, parallel=parallel)
            row = Row(replace(got, name=name), largest(got.peak_gib, device))
        rows.append(row)
        if groups.rank == 0:
            print(line(row), flush=True)
        bench.release()
        leave_layout()
    dist.barrier()
    rank = dist.get_rank()
    stop()
    if rank == 0:
        save(rows, arguments.json)
        chosen = [ours[row.measured.name] for row in rows if row.measured.name in ours]
        save(with_projections(rows, chosen, world_size, device), arguments.json)


def save(rows: Sequence[Row], path: Path | None) -> None:
    """Writes what there is."""
    if path:
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def tiny(case: Case) -> Case:
    """The same layout with small layers.

    In fp32, which loses nothing, but for overlapped all-to-alls, for which Megatron-Core has none.
    """
    return replace(
        case,
        arch=replace(case.arch, **SMALL),
        document_length=case.document_length // 64,
        precision=PrecisionSection(compute="bf16" if case.experts.overlap_all_to_all else "fp32"),
        optimizer=case.optimizer.model_copy(update={"moments": "fp32"}),
        options={},
    )


def measure(case: Case, groups: Groups, num_steps: int) -> Row:
    """Collective."""
    alone: list[float] = []

    def trace(prepared: Prepared) -> None:
        if groups.device.type == "cuda":
            alone.append(exposed(trace_step(prepared)))

    got = bench.measure(case, groups, num_steps=num_steps, afterwards=trace)
    return Row(got, largest(got.peak_gib, groups.device), *alone)


def largest(value: float, device: torch.device) -> float:
    """Collective: over all ranks."""
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def with_projections(
    rows: Sequence[Row], ours: Sequence[Case], world_size: int, device: torch.device
) -> list[Row]:
    """Prints them, too; on a CPU as for H200, on a card without a description none."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "H200"
    card = next((CARDS[key] for key in CARDS if key in name), None)
    if card is None:
        return list(rows)
    # The planner builds models without a device, for which it changes the whole process.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        told = [pool.submit(project, case, card, world_size) for case in ours]
        projected = {case.name: one.result() for case, one in zip(ours, told, strict=True)}
    for case_name, (ms, gib) in projected.items():
        print(f"{case_name:48} {ms:8.1f} ms, {gib:.1f} GiB projected for {card}", flush=True)
    return [
        replace(row, projected_ms=ms, projected_peak_gib=gib)
        for row in rows
        for ms, gib in [projected.get(row.measured.name, (None, None))]
    ]


def project(case: Case, card: str, world_size: int) -> tuple[float, float]:
    """Milliseconds of a step and peak in GiB, as planned."""
    cluster = cluster_of(card, gpus_per_node=world_size)
    workload = Workload(
        arch=case.arch,
        parallel=case.parallel,
        world_size=world_size,
        seq_length=case.num_documents * case.document_length,
        document_length=case.document_length,
        num_micro_batches=case.num_micro_batches,
        precision=case.precision,
        memory=case.memory,
        optimizer=case.optimizer,
        kernels=case.kernels,
        experts=case.experts,
    )
    step = Speed(cluster, load_kernels(cluster.card)).step(workload)
    peak = max(allocated(stage.states, stage.activations) for stage in estimate(workload))
    return step.total * 1e3, peak / GIB


def line(row: Row) -> str:
    """One case in one line."""
    got = row.measured
    text = (
        f"{got.name:48} {got.step_ms:8.1f} ms (fastest {got.fastest_ms:8.1f}) "
        f"{got.tokens_per_second:9,.0f} tokens/s a GPU {row.peak_gib:5.1f} GiB"
    )
    if row.exposed_ms is not None:
        text += f", communication alone {row.exposed_ms:.1f} ms"
    return text


if __name__ == "__main__":
    main()
