"""Step times against steps measured on an H100; kernels and links against hand-worked numbers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dsv3.config.architecture import DEEPSEEK_V3
from megatron_dsv3.config.counts import count_parameters
from megatron_dsv3.config.kernels import KernelsSection
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import MemorySection, OptimizerSection, PrecisionSection
from megatron_dsv3.plan.cards import cluster_of
from megatron_dsv3.plan.kernels import load_kernels
from megatron_dsv3.plan.layer_times import LINK_SHARE, LayerTimes
from megatron_dsv3.plan.links import EXCHANGE_REACHED, Group, Links
from megatron_dsv3.plan.records import Workload
from megatron_dsv3.plan.speed import Speed, stage_parameters
from megatron_dsv3.train.bench import slice_of_v3

JOBS = json.loads((Path(__file__).parent / "data" / "h100_jobs.json").read_text())["jobs"]
MEASURED = [job for job in JOBS if "all offloaded" not in job["name"]]
(ALL_OFFLOADED,) = [job for job in JOBS if "all offloaded" in job["name"]]
H100 = cluster_of("h100-80gb")
PLAIN = KernelsSection(fused_rope=False, dense_single_documents=False)
# docs/benchmarks.md and docs/performance.md: ms of a step, before kernels were fused.
FP8, FULL = PrecisionSection(fp8="blockwise"), MemorySection(recompute="full")
PUBLISHED = {
    "bf16 1x4k": (159.3, {}),
    "bf16 4x4k": (497.8, {"num_micro_batches": 4}),
    "fp8 4x4k": (442.9, {"num_micro_batches": 4, "precision": FP8}),
    "fp8 4x4k full": (596.0, {"num_micro_batches": 4, "precision": FP8, "memory": FULL}),
    "bf16 32k of 8": (1195.9, {"seq_length": 32768, "memory": FULL}),
    "bf16 32k of 1": (2281.4, {"seq_length": 32768, "document_length": 32768, "memory": FULL}),
}


@pytest.fixture(scope="module")
def speed() -> Speed:
    return Speed(H100, load_kernels(H100.card))


def workload(**changes) -> Workload:
    values = {
        "arch": slice_of_v3(), "parallel": Parallel(), "world_size": 1, "seq_length": 4096,
        "document_length": 4096, "kernels": PLAIN,
    }  # fmt: skip
    return Workload(**{**values, **changes})


def v3(parallel: Parallel, world_size: int = 256, **changes) -> Workload:
    values = {"seq_length": 4096, "num_micro_batches": 16, **changes}
    return Workload(arch=DEEPSEEK_V3, parallel=parallel, world_size=world_size, **values)


def measured_workload(job: dict) -> Workload:
    length = job["document_length"]
    return workload(
        arch=slice_of_v3(**job["slice"]),
        seq_length=length * job["num_documents"],
        document_length=length,
        num_micro_batches=job["num_micro_batches"],
        precision=PrecisionSection.model_validate(job["precision"]),
        memory=MemorySection.model_validate(job["memory"]),
        optimizer=OptimizerSection.model_validate(job["optimizer"]),
        kernels=KernelsSection.model_validate(job["kernels"]),
    )


@pytest.mark.parametrize("job", MEASURED, ids=lambda job: job["name"])
def test_steps_measured_on_an_h100_are_met_within_10_percent(speed, job):
    predicted = speed.step(measured_workload(job)).total * 1e3
    assert predicted == pytest.approx(job["measured"]["step_ms"], rel=0.1)


def test_offloading_all_is_not_promised_faster_than_an_h100_was(speed):
    """Megatron-Core leaves some of it on the card; the search does not try it."""
    predicted = speed.step(measured_workload(ALL_OFFLOADED)).total * 1e3
    assert 1 < predicted / ALL_OFFLOADED["measured"]["step_ms"] < 1.5


def test_no_measured_job_is_left_out():
    assert len(MEASURED) >= 16


@pytest.mark.parametrize(("ms", "changes"), PUBLISHED.values(), ids=PUBLISHED)
def test_steps_of_another_card_of_the_kind_are_met_as_well(speed, ms, changes):
    assert speed.step(workload(**changes)).total * 1e3 == pytest.approx(ms, rel=0.15)


def test_the_parts_of_a_step_sum_to_it_and_flops_give_the_mfu(speed):
    step = speed.step(v3(Parallel(tp_size=2, pp_size=8, ep_size=8, cp_size=2)))
    parts = (step.compute, step.tp, step.ep, step.cp, step.dp, step.bubble, step.optimizer)
    assert sum(parts) == pytest.approx(step.total)
    assert all(part >= 0 for part in parts)
    tokens = 16 * 4096 * 256 / (2 * 8 * 2)
    assert step.tokens_per_second_per_gpu == pytest.approx(tokens / step.total / 256)
    # A quarter of a PFLOP for 37.6e9 active weights and causal attention: 6 x 37.6e9 and more.
    assert step.tflops * 1e12 / step.tokens_per_second_per_gpu == pytest.approx(2.61e11, rel=0.03)
    assert step.mfu == pytest.approx(step.tflops / 989)
    assert set(step.origins) >= {"compute", "ep", "bubble", "optimizer"}


def test_what_should_cost_time_costs_time(speed):
    base = v3(Parallel(pp_size=8, ep_size=8))
    seconds = speed.step(base).total
    slower = {
        "recompute": replace(base, memory=FULL),
        "imbalance": replace(base, imbalance=1.5),
        "experts over nodes": v3(Parallel(pp_size=8, ep_size=32)),
        "offload": replace(base, optimizer=OptimizerSection(offload_fraction=1.0)),
    }
    for name, work in slower.items():
        assert speed.step(work).total > seconds * 1.01, name
    fewer = v3(Parallel(pp_size=8, ep_size=8), num_micro_batches=8)
    share = [speed.step(work).bubble / speed.step(work).total for work in (fewer, base)]
    assert share[0] > share[1]
    interleaved = v3(Parallel(pp_size=8, vpp_size=4, ep_size=8))
    assert speed.step(interleaved).bubble < speed.step(base).bubble
    fused = replace(base, kernels=KernelsSection())
    assert speed.step(fused).total < speed.step(replace(base, kernels=PLAIN)).total


def test_offloaded_activations_cost_what_no_layer_hides(speed):
    def work(modules, **changes):
        section = MemorySection(offload_activations=modules)
        return v3(Parallel(pp_size=8, ep_size=8), memory=section, **changes)

    plain, inputs = speed.step(work(())), speed.step(work(("expert_fc1",)))
    everything = ("attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1")
    assert plain.total <= inputs.total < speed.step(work(everything)).total
    rows = speed.units(work(everything))["moe"].rows
    (row,) = (row for row in rows if row.name.startswith("activations to host"))
    # 8 experts' inputs of 4096 tokens are 448 MiB, and all of it three times as much.
    mib = int(row.seconds.origin.split()[0])
    assert 3 * 448 < mib < 5 * 448
    seconds = mib * 2**20 / (LINK_SHARE * H100.card.host_gb_s * 1e9)
    others = sum(one.seconds.forward for one in rows) - row.seconds.forward
    assert row.seconds.forward == pytest.approx(seconds - others, abs=2e-3)
    slow = replace(H100, card=replace(H100.card, host_gb_s=5.0))
    slower = Speed(slow, load_kernels(slow.card)).step(work(("expert_fc1",)))
    assert slower.total > 2 * inputs.total


def test_the_bound_of_the_search_is_never_below_the_rate(speed):
    for parallel in (
        Parallel(pp_size=8, ep_size=8),
        Parallel(tp_size=4, pp_size=4, vpp_size=4, ep_size=16),
    ):
        work = v3(parallel)
        assert speed.rate_at_most(work) >= speed.step(work).tokens_per_second_per_gpu


def test_measured_shapes_come_back_as_measured():
    kernels = load_kernels(H100.card)
    found = kernels.product("bf16", 4096, 4096, 7168)
    assert found.forward == pytest.approx(298.0e-6)  # a row of the table
    grouped = kernels.product("blockwise", 4096, 4096, 7168, groups=8)
    assert (grouped.forward, grouped.backward) == pytest.approx((1889.2e-6, 3849.8e-6))
    between = kernels.product("bf16", 6000, 4096, 7168).forward
    assert 298.0e-6 < between < 1217.1e-6
    attention = kernels.attention(tokens=16384, length=4096, heads=128, width=320)
    assert attention.forward == pytest.approx(5146.0e-6)
    assert "linear bf16" in found.origin


def test_another_card_keeps_its_share_of_its_own_rate():
    h20 = load_kernels(cluster_of("h20-96gb").card)
    here = load_kernels(H100.card)
    big = [kernels.product("bf16", 16384, 36864, 7168).forward for kernels in (h20, here)]
    assert big[0] / big[1] == pytest.approx(781 / 137, rel=0.15)
    # A small product is bound by memory, which the H20 has more of.
    small = [kernels.product("bf16", 1024, 7168, 256).forward for kernels in (h20, here)]
    assert small[0] / small[1] < 4
    with pytest.raises(ValueError, match="a100-80gb has no FP8; set precision"):
        load_kernels(cluster_of("a100-80gb").card).product("blockwise", 4096, 4096, 7168)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("rows: []", "no card, source, rows; benchmarks/gemm_table.py writes"),
        ("{card: h100-80gb, source: x, rows: [{kind: sort}]}", "row 1: expected a kind of linear"),
        (
            "{card: h100-80gb, source: x, rows: [{kind: adam, precision: fp32, parameters: 0}]}",
            "row 1: expected positive numbers for parameters, forward_us",
        ),
        (
            "{card: h100-80gb, source: x, rows: "
            "[{kind: adam, precision: fp32, parameters: 1, forward_us: 1}]}",
            "no rows of linear in bf16, grouped in bf16, attention in bf16, adam with bf16 moments",
        ),
    ],
)
def test_a_wrong_table_says_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "kernels.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_kernels(H100.card, path)


def test_messages_by_hand():
    links = Links(H100, Parallel(tp_size=4, pp_size=8, ep_size=32), 256)
    card = H100.card
    assert links.gather(Group(1, 1), 1e9) == 0
    # Four ranks of a node: three quarters of the bytes over NVLink, four latencies.
    expected = 0.75e9 / (card.nvlink_gb_s * 1e9) + 4 * card.nvlink_latency_s
    assert links.gather(links.tp, 1e9) == pytest.approx(expected)
    # 32 ranks on 4 nodes: 24 of 32 parts leave the node.
    far = 1e9 * 24 / 32 / (EXCHANGE_REACHED * card.network_gb_s * 1e9)
    assert links.exchange(links.ep, 1e9) == pytest.approx(far + 2 * card.network_latency_s)
    assert links.dp == Group(8, 4)
    assert links.edp == Group(1, 32)
    # Data parallelism over 2 ranks a node leaves it through two adapters.
    bandwidth = 2 * card.network_gb_s * 1e9
    expected = 7 / 8 * 1e9 / bandwidth + 8 * card.network_latency_s
    assert links.gather(links.dp, 1e9) == pytest.approx(expected)
    assert links.hop(1e9) > 1e9 / (card.network_gb_s * 1e9)
    assert Links(H100, Parallel(pp_size=2), 2).hop(1e9) < links.hop(1e9)


def test_recomputation_repeats_what_belongs_to_its_modules_and_no_more():
    kernels = load_kernels(H100.card)

    def extra(modules):
        section = MemorySection(recompute="selective", recompute_modules=modules)
        base = v3(Parallel(tp_size=2, pp_size=8, ep_size=8), seq_length=16384)
        links = Links(H100, base.parallel, 256)
        plain = LayerTimes(base, kernels, links).unit("moe")
        again = LayerTimes(replace(base, memory=section), kernels, links).unit("moe")
        assert again.forward == plain.forward
        return {kind: again.backward[kind] - plain.backward[kind] for kind in plain.backward}

    none, all_of_it = extra(()), extra(("moe", "core_attn", "mla_up_proj", "layernorm"))
    assert all(value == 0 for value in none.values())
    assert extra(("core_attn",))["ep"] == 0
    assert extra(("moe",))["ep"] > 0
    assert 0 < extra(("moe_act",))["compute"] < extra(("moe",))["compute"] < all_of_it["compute"]


def test_parameters_of_all_ranks_are_those_of_the_model():
    counts = count_parameters(DEEPSEEK_V3)
    for parallel in (
        Parallel(tp_size=2, pp_size=8, ep_size=8),
        Parallel(pp_size=4, vpp_size=2, ep_size=4),
    ):
        held = stage_parameters(v3(parallel))
        common = sum(stage.common for stage in held) * parallel.tp_size
        experts = sum(stage.experts for stage in held) * parallel.ep_size
        # MTP's experts, and its embedding on the last stage.
        moe = counts.routed_experts / DEEPSEEK_V3.num_moe_layers
        assert experts == pytest.approx(counts.routed_experts + moe)
        everything = counts.total + counts.mtp + counts.embedding
        assert common + experts == pytest.approx(everything, rel=1e-5)
