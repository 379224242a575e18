"""Runs many layouts in one torchrun launch: load, train a few steps, write what came of it.

    torchrun --nproc-per-node N worker.py PLAN.json

PLAN.json: {"hf_dir", "out", "device", "cases": [Case...]}. For each case rank 0 writes
`out/NAME.json` (losses, gradient norms) and, as safetensors under Hugging Face's names,
`out/NAME/{gradients,weights}.safetensors` or the exported directory.
"""

import gc
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed.mistakes import MISTAKES
from megatron.core.transformer.moe.moe_layer import MoELayer
from safetensors.torch import save_file
from torch import Tensor

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.placement import mtp_stage, place
from megatron_dsv3.config.sections import (
    ExpertsSection,
    MemorySection,
    OptimizerSection,
    PrecisionSection,
    ScheduleSection,
)
from megatron_dsv3.convert.bridge import Bridge
from megatron_dsv3.convert.hf_io import HFReader
from megatron_dsv3.convert.mapping import Param
from megatron_dsv3.data.batch import pack_batch
from megatron_dsv3.data.dataset import Documents, rank_micro_batches
from megatron_dsv3.data.packing import pack
from megatron_dsv3.data.store import Sample
from megatron_dsv3.model import cpu
from megatron_dsv3.model.build import build_chunks, freeze_mtp, wrap
from megatron_dsv3.model.config import mcore_config
from megatron_dsv3.model.groups import device_of, leave_layout, start, stop
from megatron_dsv3.train.optimizer import build_optimizer, build_schedule
from megatron_dsv3.train.step import TrainStep

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One layout and what to do in it."""

    name: str
    parallel: dict[str, Any] = field(default_factory=dict)
    steps: int = 4
    micro_batch_size: int = 1
    dtype: str = "fp32"
    balance: float = 0.0
    experts: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)
    mtp: str = "train"
    lr: float = 1e-3
    packed: bool = False
    """Documents of several lengths share a row of twice the length; else one has it alone."""
    mistake: str | None = None
    """One of `mistakes.MISTAKES`, planted for this case alone."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    mtp_losses: list[float | None]
    grad_norms: list[float]
    balances: list[float]
    evaluated: list[float | None]
    """Main and MTP loss of the second step's data after it; the third is to find no trace of it."""


def samples(seed: int, number: int, *, vocab_size: int, longest: int) -> list[Sample]:
    """Documents of uneven length, about two thirds of their tokens counted."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(number):
        length = int(torch.randint(2, longest + 1, (1,), generator=generator))
        tokens = torch.randint(1, vocab_size, (length,), generator=generator, dtype=torch.int32)
        counted = torch.rand(length, generator=generator) < 0.7
        made.append(Sample(f"{seed}:{index}", tokens.numpy(), counted.numpy()))
    return made


def packed_rows(
    whole: list[Sample], row_length: int, multiple: int, *, num_rows: int
) -> list[Documents]:
    """The same documents as fewer rows of several lengths each; rows without any fill up."""
    lengths = np.array([len(sample.tokens) for sample in whole])
    packs = pack(lengths, row_length=row_length, multiple=multiple)
    assert 1 < len(packs) < num_rows
    rows = [tuple(whole[i] for i in packs[row]) for row in range(len(packs))]
    return rows + [()] * (num_rows - len(rows))


class GradientBridge(Bridge):
    """Exports the gradients in the place of the weights."""

    def local_tensors(self) -> list[tuple[Param, Tensor]]:
        gradient = {id(t): getattr(t, "main_grad", t) for _, t in super().local_tensors()}
        return [(param, gradient[id(tensor)]) for param, tensor in super().local_tensors()]


def gather_gradients(wrapped: list[Any]) -> None:
    """Makes every rank's buffers whole: the distributed optimizer reduces only a rank's shard."""
    for model in wrapped:
        for buffer in [*model.buffers, *model.expert_parallel_buffers]:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shards = bucket.grad_data.view(group.size(), -1)
                mine = shards[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)


def run(
    case: Case, hf_dir: Path, out: Path, device: torch.device, *, batch_size: int, longest: int
) -> None:
    arch = Architecture.from_hf(hf_dir)
    parallel = Parallel(**case.parallel)
    mtp = mtp_stage(place(arch, parallel))
    groups = start(parallel, device, seed=7, mtp_stage=mtp)
    experts = ExpertsSection(aux_loss_coefficient=case.balance, **case.experts)
    dtype = DTYPES[case.dtype]
    config = mcore_config(
        arch,
        parallel,
        dtype=dtype,
        device=groups.device,
        experts=experts.model_copy(update={"overlap_all_to_all": False}),
        memory=MemorySection(**case.memory),
        precision=PrecisionSection(**case.precision),
    )
    # Megatron-Core's check wants bf16 for it, whose rounding would hide small mistakes.
    config.overlap_moe_expert_parallel_comm = experts.overlap_all_to_all
    chunks = build_chunks(
        arch,
        parallel,
        groups,
        config,
        max_seq_length=longest,
        transformer_engine=device.type == "cuda",
    )
    bridge = Bridge(chunks, arch, parallel, groups)
    bridge.load(HFReader(hf_dir))
    if case.steps == 0:
        _save(bridge, out / case.name, "weights", dtype)
        return
    if case.mtp == "freeze":
        freeze_mtp(chunks)
    # Where a gradient is near zero Adam magnifies its rounding, unless epsilon is well above that.
    section = OptimizerSection(lr=case.lr, eps=1e-5, **case.optimizer)
    wrapped = wrap(
        chunks,
        config,
        optimizer=section,
        num_optimizer_instances=parallel.num_optimizer_instances,
    )
    optimizer = build_optimizer(section, wrapped, dtype=dtype)
    schedule = build_schedule(
        ScheduleSection(decay="constant", warmup_steps=0),
        optimizer,
        max_lr=section.lr,
        weight_decay=0.0,
        num_steps=case.steps,
    )
    step = TrainStep(wrapped, optimizer, groups, mtp_loss_weight=0.3, experts=experts)
    results = []
    for number in range(case.steps):
        whole = samples(number, batch_size, vocab_size=arch.vocab_size, longest=longest)
        rows, row_length, multiple = [(sample,) for sample in whole], longest, longest
        if case.packed:
            row_length, multiple = 2 * longest, 2 * parallel.cp_size
            rows = packed_rows(whole, row_length, multiple, num_rows=batch_size)
        mine = rank_micro_batches(
            rows,
            micro_batch_size=case.micro_batch_size,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
        )
        batches = [
            pack_batch(
                micro,
                row_length=row_length,
                multiple=multiple,
                num_mtp=arch.num_mtp_layers,
                pad_id=0,
            )
            for micro in mine
        ]
        results.append(step(batches))
        schedule.step(1)
        if number == 0:
            gather_gradients(wrapped)
            gradients = GradientBridge(chunks, arch, parallel, groups)
            _save(gradients, out / case.name, "gradients", torch.float32)
        if number == 1:
            evaluated = step.evaluate(batches)
    step.settle()
    _save(bridge, out / case.name, "weights", dtype)
    _let_go(chunks, config)
    if groups.rank == 0:
        outcome = Outcome(
            [r.losses.main for r in results],
            [r.losses.mtp for r in results],
            [r.grad_norm for r in results],
            [r.expert_balance for r in results],
            [evaluated.main, evaluated.mtp],
        )
        (out / f"{case.name}.json").write_text(json.dumps(asdict(outcome)))


def _let_go(chunks: list[Any], config: Any) -> None:
    """Breaks cycles through autograd's graph, which Python cannot see; groups stay with a model."""
    config.finalize_model_grads_func = None
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, MoELayer):
            vars(module.token_dispatcher).clear()


def _save(bridge: Bridge, directory: Path, name: str, dtype: torch.dtype) -> None:
    tensors = {key: value.to("cpu", copy=True) for key, value in bridge.export(dtype=dtype)}
    if bridge.groups.rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / f"{name}.safetensors")


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    device = device_of(plan["device"])
    if device.type == "cpu":
        cpu.enable()
    for entry in plan["cases"]:
        case = Case(**entry)
        sizes = {"batch_size": plan["batch_size"], "longest": plan["longest"]}
        try:
            with pytest.MonkeyPatch.context() as patch:
                if case.mistake:
                    MISTAKES[case.mistake](patch)
                run(case, Path(plan["hf_dir"]), Path(plan["out"]), device, **sizes)
        except Exception as error:
            error.add_note(f"in case {case.name!r}")
            raise
        # The processes stay joined: a second rendezvous would meet the first one's addresses.
        leave_layout()
        gc.collect()  # a model is part of a cycle, and holds the groups that it was built in
    stop()


if __name__ == "__main__":
    main()
