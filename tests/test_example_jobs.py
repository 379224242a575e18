"""The jobs in examples/ are what their comments say: they fit their model, machine and memory."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dsv3.commands.bench import CASES as CASES_MEASURED
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


def test_the_job_of_one_gpu_is_the_one_that_an_h100_ran():
    (case,) = (case for case in CASES_MEASURED if case.name == "whole model of 7.0 B")
    job = load_job(EXAMPLES / "sft_one_gpu.yaml")
    assert job.problems(case.arch, 1) == []
    assert job.backend_problems("cuda") == []
    ours, measured = job.optimizer, case.optimizer
    assert (ours.moments, ours.gradients) == (measured.moments, measured.gradients)
    assert (job.memory, job.kernels, job.precision) == (case.memory, case.kernels, case.precision)
    rows = (job.data.seq_length, job.num_micro_batches(1), job.train.micro_batch_size)
    assert rows == (case.document_length, case.num_micro_batches, case.num_documents)
    (stage,) = estimate(Workload.of_job(job, case.arch, 1))
    # As docs/benchmarks.md has it; the logits are counted without the fused loss.
    assert stage.allocated / GIB == pytest.approx(69.2, rel=0.035)
    assert stage.total / GIB < CARD_GIB
