"""The bench on a CPU: what it counts, and that it trains the slice that it says it does."""

from dataclasses import replace

import pytest
import torch

from megatron_dsv3.config.architecture import DEEPSEEK_V3
from megatron_dsv3.config.counts import count_parameters, flops_per_token
from megatron_dsv3.config.sections import PrecisionSection
from megatron_dsv3.train import bench
from megatron_dsv3.train.bench import Case, slice_of_v3

CASE = Case(
    name="tiny",
    arch=replace(
        slice_of_v3(num_layers=2, num_experts=2, vocab_size=64, num_mtp_layers=1),
        hidden_size=32, ffn_hidden_size=32, moe_ffn_hidden_size=16, num_heads=2, q_lora_rank=8,
        kv_lora_rank=8, qk_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    ),
    num_micro_batches=2, document_length=16, num_documents=3,
    precision=PrecisionSection(compute="fp32"),
)  # fmt: skip


def test_a_slice_keeps_every_width_of_the_671b():
    cut = {"num_layers", "num_dense_layers", "num_experts", "vocab_size", "num_mtp_layers"}
    cut |= {"num_groups", "num_groups_per_token", "num_experts_per_token"}
    arch = slice_of_v3()
    kept = set(arch.__dataclass_fields__) - cut
    assert {n: getattr(arch, n) for n in kept} == {n: getattr(DEEPSEEK_V3, n) for n in kept}
    assert arch.num_experts == arch.num_experts_per_token == DEEPSEEK_V3.num_experts_per_token


def test_every_token_of_a_random_batch_counts_but_each_documents_last():
    batches = bench.random_batches(CASE, seed=0)
    assert len(batches) == 2
    assert all(int((~batch.padding).sum()) == 48 for batch in batches)
    assert [int(batch.loss_mask[depth].sum()) for batch in batches for depth in (0, 1)] == [
        45, 42, 45, 42,
    ]  # fmt: skip


def test_a_measured_step_trains_the_slice(groups):
    measured = bench.measure(CASE, groups, num_steps=2)
    counts = count_parameters(CASE.arch)
    assert measured.parameters == counts.total + counts.mtp
    assert measured.loss == pytest.approx(torch.tensor(64.0).log().item(), rel=0.2)
    assert measured.tokens_per_second == pytest.approx(96 / (measured.step_ms / 1e3))
    rate = measured.tokens_per_second * flops_per_token(CASE.arch, 16) / 1e12
    assert measured.tflops == pytest.approx(rate)


def test_a_case_gives_its_memory_back(groups):
    prepared = bench.prepare(CASE, groups)
    assert prepared.one() > 0
    bench.free(prepared.step.chunks, prepared.step.optimizer)
    assert sum(p.numel() for chunk in prepared.step.chunks for p in chunk.parameters()) == 0
