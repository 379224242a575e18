"""What the planner says of memory: against an H100, whole stages, and numbers by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.pipeline_parallel import fine_grained_activation_offload as offload
from torch import nn

from megatron_dsv3.config.architecture import DEEPSEEK_V3
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.placement import place
from megatron_dsv3.config.sections import MemorySection, OptimizerSection, PrecisionSection
from megatron_dsv3.model.groups import stop
from megatron_dsv3.plan import units
from megatron_dsv3.plan.activations import count
from megatron_dsv3.plan.build import built
from megatron_dsv3.plan.cards import cluster_of
from megatron_dsv3.plan.estimate import estimate
from megatron_dsv3.plan.layouts import RECOMPUTE, Request, layouts
from megatron_dsv3.plan.memory import count_memory
from megatron_dsv3.plan.meter import Meter
from megatron_dsv3.plan.records import GIB, Workload
from megatron_dsv3.plan.saved_tensors import holding, total
from megatron_dsv3.plan.states import GEMM_WORKSPACES, optimizer_bytes
from megatron_dsv3.train.bench import slice_of_v3
from megatron_dsv3.train.optimizer import build_optimizer

DATA = Path(__file__).parent / "data"
JOBS = [
    job
    for card in ("h100", "h200")
    for job in json.loads((DATA / f"{card}_jobs.json").read_text())["jobs"]
]
MODULES = json.loads((DATA / "h100_modules.json").read_text())["modules"]
FULL = MemorySection(recompute="full")
SELECTIVE = MemorySection(recompute="selective")
FP8 = PrecisionSection(fp8="blockwise")
FP8_WEIGHTS = PrecisionSection(fp8="blockwise", fp8_params=True)
SMALL = replace(
    DEEPSEEK_V3, vocab_size=256, hidden_size=64, num_layers=4, num_dense_layers=1, num_heads=8,
    ffn_hidden_size=128, moe_ffn_hidden_size=64, q_lora_rank=32, kv_lora_rank=16, qk_head_dim=16,
    qk_rope_head_dim=8, v_head_dim=16, num_experts=16, num_mtp_layers=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_groups_of_another_test():
    stop()


def measured_workload(job: dict) -> Workload:
    length = job["document_length"]
    return Workload(
        arch=slice_of_v3(**job["slice"]),
        parallel=Parallel(),
        world_size=1,
        seq_length=length * job["num_documents"],
        document_length=length,
        num_micro_batches=job["num_micro_batches"],
        precision=PrecisionSection.model_validate(job["precision"]),
        memory=MemorySection.model_validate(job["memory"]),
        optimizer=OptimizerSection.model_validate(job["optimizer"]),
    )


@pytest.mark.parametrize("job", JOBS, ids=[job["name"] for job in JOBS])
def test_a_job_takes_the_memory_that_was_measured(job):
    (stage,) = count_memory(measured_workload(job), build_optimizer)
    # The workspaces were there before the job was measured.
    predicted = stage.allocated - GEMM_WORKSPACES
    assert predicted == pytest.approx(job["measured"]["peak"], rel=0.02)


def test_states_between_steps_are_what_an_h100_measured():
    for job in JOBS[::4]:
        workload = measured_workload(job)
        (stage,) = count_memory(workload, build_optimizer)
        with built(workload, 0) as rank:
            (chunk,) = count(rank, workload)
        stays = stage.states.gpu + chunk.left - GEMM_WORKSPACES
        assert stays == pytest.approx(job["measured"]["between_steps"], rel=0.015), job["name"]


def test_casting_masters_to_fp8_weights_takes_what_an_h100_measured():
    (job,) = (
        job for job in JOBS
        if job["precision"]["fp8_params"] and not job["memory"]["offload_activations"]
    )  # fmt: skip
    (stage,) = count_memory(measured_workload(job), build_optimizer)
    measured = job["measured"]["peak_update"] - job["measured"]["between_steps"]
    assert stage.states.update == pytest.approx(measured, rel=0.01)
    # Where activations are few it is what a card must have room for.
    few = replace(stage, activations=replace(stage.activations, working=0, saved=0, experts=0))
    assert few.allocated == pytest.approx(
        job["measured"]["peak_update"] + GEMM_WORKSPACES, rel=0.005
    )


KINDS = {
    "input_layernorm": "norm",
    "linear_q_down_proj": "product",
    "linear_kv_down_proj": "product",
    "linear_q_up_proj": "norm_product",
    "linear_kv_up_proj": "norm_product",
    "core_attention": "attention",
    "linear_proj": "product_of_kept_input",
    "dense linear_fc1": "norm_product",
    "dense linear_fc2": "product",
    "shared linear_fc1": "product_of_kept_input",
    "shared linear_fc2": "product",
    "experts linear_fc1": "grouped_product",
    "experts linear_fc2": "grouped_product",
}


@pytest.mark.parametrize("name", KINDS)
def test_the_table_of_saved_tensors_is_what_an_h100_measured(name):
    measured = [row for row in MODULES if row["module"] == name]
    assert {row["precision"] for row in measured} == {"bf16", "blockwise", "tensorwise"}
    for row in measured:
        kept = holding(KINDS[name], row["precision"])
        heads = DEEPSEEK_V3.num_heads if name == "core_attention" else 1
        sizes = {
            "input": sum(math.prod(shape) for shape in row["inputs"]),
            "output": row["output_bytes"] // 2,
            "row": row["inputs"][0][0] * heads,
            "query": math.prod(row["inputs"][0]),
        }
        held = total(kept.holds, sizes)
        assert held == pytest.approx(row["extra"], rel=0.01, abs=2**16)
        assert kept.keeps_input == (row["input"] > 0)
        assert kept.keeps_output == (row["output"] > 0)
        forward = held + total(kept.forward, sizes) + row["output_bytes"]
        assert forward == pytest.approx(row["forward"], rel=0.01)
        # A norm's backward has a workspace of 5 MiB whatever its size.
        backward = total(kept.backward, sizes) + row["input_bytes"]
        assert backward == pytest.approx(row["backward"], rel=0.01, abs=6 * 2**20)


LAYOUTS = {
    "one GPU": (slice_of_v3(num_mtp_layers=1), Parallel(), 1, SELECTIVE, PrecisionSection()),
    "TP2 PP8 EP32, full": (
        DEEPSEEK_V3, Parallel(tp_size=2, pp_size=8, ep_size=32), 256, FULL, PrecisionSection()
    ),
    "TP4 PP16 EP16 ETP2 CP2, FP8": (
        DEEPSEEK_V3,
        Parallel(tp_size=4, pp_size=16, cp_size=2, ep_size=16, etp_size=2), 512, SELECTIVE, FP8,
    ),
    "TP2 PP16 EP8, FP8 weights": (
        DEEPSEEK_V3, Parallel(tp_size=2, pp_size=16, ep_size=8), 256, FULL, FP8_WEIGHTS
    ),
    "TP4 PP8 VPP2 EP8, inputs offloaded": (
        DEEPSEEK_V3, Parallel(tp_size=4, pp_size=8, vpp_size=2, ep_size=8), 128,
        RECOMPUTE["inputs offloaded"], PrecisionSection(),
    ),
    "PP4 VPP4 EP64": (
        DEEPSEEK_V3, Parallel(pp_size=4, vpp_size=4, ep_size=64), 256, SELECTIVE, FP8
    ),
    "stages by hand": (
        DEEPSEEK_V3,
        Parallel(tp_size=2, pp_size=4, ep_size=8, stages="Et*15|t*16|t*16|t*14mL"), 64,
        MemorySection(), PrecisionSection(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_counted_units_sum_up_to_whole_stages(name):
    arch, parallel, world_size, memory, precision = LAYOUTS[name]
    workload = Workload(
        arch=arch, parallel=parallel, world_size=world_size, seq_length=8192, memory=memory,
        precision=precision, num_micro_batches=16, imbalance=1.2,
    )  # fmt: skip
    counted = count_memory(workload, build_optimizer)
    for one, other in zip(estimate(workload), counted, strict=True):
        assert one.states.gpu == pytest.approx(other.states.gpu, rel=0.002)
        assert one.states.update == pytest.approx(other.states.update, rel=0.005)
        assert one.activations.total == pytest.approx(other.activations.total, rel=0.01)
        assert one.total == pytest.approx(other.total, rel=0.005)
        assert one.activations.host == pytest.approx(other.activations.host, rel=0.001)
        assert one.letters == other.letters


def test_states_of_the_671b_are_those_of_its_published_layout():
    """FP32 gradients and 12 bytes of masters and moments, by the parameters that a rank holds."""
    workload = Workload(
        arch=DEEPSEEK_V3, parallel=Parallel(pp_size=8, ep_size=32), world_size=256,
        seq_length=4096, memory=FULL,
    )  # fmt: skip
    states = count_memory(workload, build_optimizer)[0].states
    # Every weight of rank 0: counted by hand from the shapes in config.json.
    attention = 7168 * (1536 + 576) + 1536 * 24576 + 512 * 32768 + 16384 * 7168 + 1536 + 512
    dense, expert = 3 * 7168 * 18432, 3 * 7168 * 2048
    layers = len(place(DEEPSEEK_V3, workload.parallel)[0].layers)
    common = 129280 * 7168 + layers * (attention + 2 * 7168) + 3 * dense
    common += (layers - 3) * (expert + 256 * 7168)
    experts = (layers - 3) * 8 * expert
    assert states.parameters == common + experts
    assert states.weights == pytest.approx(2 * (common + experts), rel=1e-3)
    assert states.gradients == pytest.approx(4 * (common + experts), rel=1e-3)
    # 32 data-parallel ranks share out the common part; each expert is on one rank alone.
    assert states.optimizer == pytest.approx(12 * (common / 32 + experts), rel=1e-3)


@pytest.mark.parametrize(
    ("optimizer", "precision", "gpu", "host"),
    [
        ({}, PrecisionSection(), 12, 0),
        ({"moments": "bf16"}, PrecisionSection(), 6, 0),
        ({"moments": "bf16"}, FP8, 6, 0),
        ({"moments": "bf16"}, FP8_WEIGHTS, 8, 0),
        ({"offload_fraction": 0.5}, PrecisionSection(), 6, 8),
        ({}, PrecisionSection(compute="fp32"), 8, 0),
    ],
    ids=str,
)
def test_bytes_of_a_parameter_in_the_optimizer(optimizer, precision, gpu, host):
    each = optimizer_bytes(OptimizerSection(**optimizer), precision)
    assert (each.gpu, each.host) == (gpu, host)


def small(**settings) -> Workload:
    values = {"arch": SMALL, "parallel": Parallel(ep_size=2), "world_size": 2, "seq_length": 512}
    return Workload(**values | settings)


def test_imbalance_is_about_the_experts_alone():
    even, uneven = (
        count_memory(small(imbalance=imbalance), build_optimizer)[0].activations
        for imbalance in (1.0, 2.0)
    )
    assert uneven.saved == even.saved
    assert uneven.logits == even.logits
    # What is sent out stays the same; what comes in doubles.
    assert 1.4 * even.experts < uneven.experts < 2 * even.experts


def test_frozen_mtp_layers_have_no_gradients():
    trained, frozen = (
        count_memory(small(mtp_frozen=is_frozen), build_optimizer)[0].states
        for is_frozen in (False, True)
    )
    assert frozen.weights == pytest.approx(trained.weights, rel=0.02)
    assert frozen.gradients < 0.9 * trained.gradients
    assert frozen.parameters < trained.parameters


def test_layers_that_stay_out_of_fp8_have_no_copies():
    some, none = (
        count_memory(
            small(precision=PrecisionSection(fp8="blockwise", bf16_first_layers=layers)),
            build_optimizer,
        )[0]
        for layers in (2, 0)
    )
    assert some.states.caches < none.states.caches
    assert some.activations.saved > none.activations.saved


def test_the_table_of_units_has_all_that_the_search_asks_for():
    request = Request(
        arch=DEEPSEEK_V3, cluster=cluster_of("h100-80gb"), nodes=16, seq_length=65536,
        precisions=("bf16", "fp8"),
    )  # fmt: skip
    table = units._counted_before()
    for layout in layouts(request):
        cut = units.cut_of(layout.workload)
        assert all(units._entry(name, cut) in table for name in units.STAGES), cut


@pytest.mark.parametrize("name", ["dense", "moe", "end"])
def test_the_table_of_units_is_what_is_counted_now(name):
    workload = Workload(
        arch=DEEPSEEK_V3, parallel=Parallel(tp_size=4, pp_size=4, ep_size=8), world_size=32,
        seq_length=4096, memory=SELECTIVE, precision=FP8, imbalance=1.2,
    )  # fmt: skip
    cut = units.cut_of(workload)
    assert units._entry(name, cut) in units._counted_before()
    assert units.unit_of(name, DEEPSEEK_V3, cut) == units.count_unit(name, DEEPSEEK_V3, cut)


@pytest.mark.parametrize("precision", [PrecisionSection(), FP8], ids=["bf16", "fp8"])
def test_offloaded_inputs_leave_the_card_until_backward(precision):
    def counted(memory):
        work = Workload(
            arch=slice_of_v3(num_layers=4, num_dense_layers=1), parallel=Parallel(), world_size=1,
            seq_length=4096, memory=memory, precision=precision,
        )  # fmt: skip
        with built(work, 0) as rank:
            (chunk,) = count(rank, work)
        return chunk

    offloaded = RECOMPUTE["inputs offloaded"]
    stays = counted(offloaded.model_copy(update={"offload_activations": ()}))
    goes = counted(offloaded)
    # Three layers with 8 experts a token: what is offloaded is in bf16 even where products are not.
    inputs = 4096 * 8 * 7168 * 2
    assert (stays.host, goes.host) == (0, 3 * inputs)
    kept = 1.0 if precision.fp8 == "off" else 1.03125 / 2
    held = sum(stays.held.values()) - sum(goes.held.values())
    assert held == pytest.approx(3 * inputs * kept, rel=0.001)
    # Most is there when the last layer's backward begins, and the inputs before it come back.
    peak = sum(stays.peak.values()) - sum(goes.peak.values())
    if precision.fp8 == "off":
        assert peak == pytest.approx(inputs, rel=0.01)
    else:  # what comes back is twice as large as what would have stayed
        assert 0.3 * inputs < peak < (3 * kept - 1) * inputs
    assert goes.left == stays.left
    assert offload.PipelineOffloadManager.OFFLOAD_MGR is None


def test_the_meter_sees_what_lives_and_when():
    model = nn.Sequential(
        nn.Linear(256, 512, device="meta"), nn.ReLU(), nn.Linear(512, 256, device="meta")
    )
    with Meter(model, lambda module, phase: f"{phase} {module}".strip()) as meter:
        with meter.at("forward"):
            x = torch.empty(128, 256, device="meta")
            y = model(x).sum()
        kilo = 1024
        # ReLU keeps its result, the linears their inputs, the sum nothing.
        assert {k: v for k, v in meter.now.items() if v} == {
            "forward": 128 * kilo + 512, "forward 1": 256 * kilo,
        }  # fmt: skip
        with meter.at("backward"):
            y.backward()
        del x, y
        # Gradients of both weights and biases.
        assert sum(meter.now.values()) == 2 * 512 * kilo + 2048 + 1024
    assert sum(meter.at_peak.values()) > sum(meter.now.values())


def test_the_meter_sees_storages_that_are_emptied():
    with Meter(nn.Linear(1, 1), lambda *_: "all") as meter:
        x = torch.empty(1024, device="meta")
        view = x[10:]
        x.untyped_storage().resize_(0)
        assert meter.now["all"] == 0
        assert view.numel() == 1014
    assert meter.at_peak["all"] == 4096


def test_a_stage_that_is_too_full_is_seen_against_the_card():
    workload = Workload(
        arch=DEEPSEEK_V3, parallel=Parallel(pp_size=8, ep_size=8), world_size=64,
        seq_length=4096, memory=FULL, imbalance=1.2,
    )  # fmt: skip
    fullest = max(stage.total for stage in estimate(workload))
    assert fullest > 80 * GIB
