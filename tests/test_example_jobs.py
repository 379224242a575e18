"""The jobs in examples/ are what their comments say: they fit their model, machine and memory."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dsv3.config.architecture import DEEPSEEK_V3
from megatron_dsv3.config.job import Job, load_job
from megatron_dsv3.config.placement import place, stage_costs
from megatron_dsv3.plan.estimate import estimate
from megatron_dsv3.plan.records import Workload

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
GIB = 1 << 30
CARD_GIB = 74.5
"""Of an 80 GB card."""
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
def test_its_fullest_rank_leaves_a_quarter_of_the_card(case):
    """By the planner, with experts that get a fifth more tokens than their share."""
    job, arch, world_size = case
    workload = Workload.of_job(job, arch, world_size, imbalance=1.2)
    totals = [stage.total / GIB for stage in estimate(workload)]
    assert len(totals) == job.parallel.pp_size
    assert 0.5 * CARD_GIB < max(totals) < 0.75 * CARD_GIB, totals
