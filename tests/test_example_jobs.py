"""The jobs in examples/ are what their comments say: they fit their model, machine and memory."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_dsv3.config.architecture import DEEPSEEK_V3
from megatron_dsv3.config.job import Job, load_job
from megatron_dsv3.config.placement import place, stage_costs
from megatron_dsv3.model import cpu
from megatron_dsv3.model.build import build_chunks
from megatron_dsv3.model.config import mcore_config
from megatron_dsv3.model.groups import start, stop

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
GIB = 1 << 30
# Of the 74.5 of an 80 GB card. The rest is for activations: under full recomputation 8 stages keep
# the inputs of 8 layers of 4096 tokens, 4 GiB; beside them one layer at work, experts that get more
# than their share of tokens, and the head's logits.
MOST_STATE_GIB = 45
# 16 billion parameters, as Moonlight's.
SMALL = replace(
    DEEPSEEK_V3, hidden_size=2048, num_layers=27, num_dense_layers=1, num_heads=16,
    ffn_hidden_size=11264, moe_ffn_hidden_size=1408, num_experts=64, num_experts_per_token=6,
    num_groups=1, num_groups_per_token=1, q_lora_rank=None, num_mtp_layers=0,
)  # fmt: skip
CASES = {
    "sft_671b": (DEEPSEEK_V3, 256),
    "sft_671b_16nodes": (DEEPSEEK_V3, 128),
    "sft_small": (SMALL, 8),
}


@pytest.fixture(params=CASES)
def case(request) -> tuple[Job, object, int]:
    arch, world_size = CASES[request.param]
    return load_job(EXAMPLES / f"{request.param}.yaml"), arch, world_size


@pytest.fixture
def fresh() -> Iterator[None]:
    cpu.enable()
    stop()
    yield
    stop()


def test_it_fits_its_model_and_its_number_of_gpus(case):
    job, arch, world_size = case
    assert job.problems(arch, world_size) == []
    assert job.backend_problems("cuda") == []
    assert job.problems(arch, world_size // 2 * 3) != []


def test_stages_are_even_and_well_filled(case):
    job, arch, world_size = case
    costs = stage_costs(arch, place(arch, job.parallel), job.data.seq_length)
    assert max(costs) * len(costs) < 1.15
    # A pipeline idles for (stages - 1) of (micro-batches + stages - 1) slots.
    num = job.num_micro_batches(world_size)
    assert (job.parallel.pp_size - 1) / (num + job.parallel.pp_size - 1) < 0.2


@pytest.mark.slow
def test_its_states_leave_room_for_activations(case, fresh):
    """Counted on real models on the meta device, one rank of each stage."""
    job, arch, world_size = case
    pp_size = job.parallel.pp_size
    sizes = [
        _state_bytes(job, arch, stage * (world_size // pp_size), world_size) / GIB
        for stage in range(pp_size)
    ]
    assert 5 < max(sizes) < MOST_STATE_GIB, sizes


def _state_bytes(job: Job, arch, rank: int, world_size: int) -> float:
    """Weights, gradients, and this rank's share of the optimizer's states on the GPU."""
    if dist.is_initialized():
        stop()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    groups = start(job.parallel, torch.device("cpu"))
    config = mcore_config(
        arch, job.parallel, dtype=torch.bfloat16, device=groups.device, memory=job.memory
    )
    chunks = build_chunks(
        arch, job.parallel, groups, config,
        max_seq_length=job.data.seq_length, transformer_engine=False, meta=True,
    )  # fmt: skip
    weight_and_gradient = 2 + {"fp32": 4, "bf16": 2}[job.optimizer.gradients]
    states = 4 + 2 * {"fp32": 4, "bf16": 2}[job.optimizer.moments]
    states *= 1 - job.optimizer.offload_fraction
    dense, experts = groups.dp_size * job.parallel.cp_size, job.parallel.edp_size(world_size)

    def copies(parameter: torch.nn.Parameter) -> int:
        return dense if getattr(parameter, "allreduce", True) else experts  # Megatron-Core's mark

    return sum(
        parameter.numel() * (weight_and_gradient + states / copies(parameter))
        for chunk in chunks
        for parameter in chunk.parameters()
    )
