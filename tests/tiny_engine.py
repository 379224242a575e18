"""A tiny model that trains on random documents, put together from a job as the command does it."""

from pathlib import Path
from typing import Any

import torch
from distributed.worker import samples

from megatron_dsv3.commands.assemble import Engine, build_engine, build_model
from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.job import Job
from megatron_dsv3.convert.hf_io import HFReader
from megatron_dsv3.data.batch import make_batch
from megatron_dsv3.data.dataset import rank_micro_batches
from megatron_dsv3.model.groups import Groups

LENGTH, BATCH, NUM_STEPS = 16, 4, 6


def make_job(hf_dir: Path, **sections: dict[str, Any]) -> Job:
    content: dict[str, dict[str, Any]] = {
        "model": {"hf_dir": str(hf_dir)},
        "data": {"paths": ["none.jsonl"], "seq_length": LENGTH},
        "train": {"global_batch_size": BATCH, "device": "cpu"},
        # Where a gradient is near zero Adam magnifies its rounding, unless epsilon is well above.
        "optimizer": {"lr": 1e-3, "eps": 1e-5},
        "schedule": {"warmup_steps": 1},
        "precision": {"compute": "fp32"},
        "experts": {"bias": "update"},
        "output": {"dir": str(hf_dir / "unused")},
    }
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section}
    return Job.model_validate(content)


def make_engine(job: Job, groups: Groups, *, load: bool = True) -> Engine:
    arch = Architecture.from_hf(job.model.hf_dir)
    bridge = build_model(job, arch, groups, checkpoint=arch)
    if load:
        bridge.load(HFReader(job.model.hf_dir))
    return build_engine(job, bridge, num_steps=NUM_STEPS)


def train_step(engine: Engine, number: int) -> float:
    """Loss of the step after `number` steps."""
    arch, groups = engine.bridge.arch, engine.bridge.groups
    whole = samples(number, BATCH, vocab_size=arch.vocab_size, longest=LENGTH)
    mine = rank_micro_batches(
        whole, micro_batch_size=1, dp_rank=groups.dp_rank, dp_size=groups.dp_size
    )
    batches = [
        make_batch(micro, seq_length=LENGTH, num_mtp=arch.num_mtp_layers, pad_id=0)
        for micro in mine
    ]
    loss = engine.step(batches).losses.main
    engine.schedule.step(1)
    return loss


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Of this rank, expert biases too."""
    engine.step.settle()
    return {p.mcore: t.detach().clone() for p, t in engine.bridge.local_tensors()}


def optimizer_state(engine: Engine) -> dict[str, torch.Tensor]:
    """fp32 masters and moments of the ranks that share this rank's weights, and the step."""
    found = {}
    for number, part in enumerate(engine.optimizer.chained_optimizers):
        state = part.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
        for buffer, by_dtype in state.items():
            if buffer == "buckets_coalesced":
                continue
            for tensors in by_dtype.values():
                kept = {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)}
                found |= {f"{number}.{buffer}.{key}": value for key, value in kept.items()}
        for index, group in enumerate(part.state_dict()["optimizer"]["param_groups"]):
            found[f"{number}.group{index}"] = torch.tensor([group["step"], group["lr"]])
    return found


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names whose bits differ."""
    assert one.keys() == other.keys()
    assert one
    return [name for name in one if not torch.equal(one[name], other[name])]
