"""`plan show`, `plan compare`, and the plan that a training prints of itself."""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from megatron_dsv3.commands import plan_job, plan_show
from megatron_dsv3.commands.plan_show import Question
from megatron_dsv3.config.architecture import DEEPSEEK_V3
from megatron_dsv3.config.job import Job
from megatron_dsv3.model.groups import stop
from megatron_dsv3.plan.cards import cluster_of
from megatron_dsv3.plan.kernels import load_kernels
from megatron_dsv3.plan.records import GIB
from megatron_dsv3.plan.speed import Speed


@pytest.fixture(autouse=True)
def no_groups_of_another_test():
    stop()


def job(**sections) -> Job:
    return Job.model_validate(
        {
            "model": {"hf_dir": "/nowhere"},
            "data": {"store": "/nowhere", "seq_length": 4096},
            "train": {"global_batch_size": 64},
            "parallel": {"tp_size": 8, "pp_size": 2, "ep_size": 32},
            "memory": {"recompute": "full"},
            "output": {"dir": "/nowhere/out"},
            **sections,
        }
    )


def question(model: str | None, *, world_size: int = 64, **sections) -> Question:
    cluster = cluster_of("h100-80gb")
    return Question(job=job(**sections), world_size=world_size, cluster=cluster, model=model)


@pytest.fixture
def six_layers(tmp_path) -> str:
    """DeepSeek-V3 cut in depth."""
    small = DEEPSEEK_V3.to_hf() | {"num_hidden_layers": 6, "num_nextn_predict_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(small))
    return str(tmp_path)


def console() -> Console:
    return Console(record=True, width=100)


def test_a_plan_is_shown_by_stage_and_says_what_is_missing(tmp_path, six_layers):
    shown = console()
    few = question(six_layers, world_size=2, parallel={"pp_size": 2})
    plan_show.show(few, shown, origins=True, json_file=tmp_path / "plan.json")
    text = shown.export_text()
    assert "2 x h100-80gb, PP2: 64 micro-batches" in text
    assert "States, GiB a GPU" in text
    assert "Et*" in text
    assert "does not fit: stage" in text
    content = json.loads((tmp_path / "plan.json").read_text())
    assert [stage["pp_rank"] for stage in content["stages"]] == [0, 1]
    assert content["spare_gib"] < 0
    assert all(s["states_gib"] < s["allocated_gib"] < s["total_gib"] for s in content["stages"])


def test_what_a_job_script_says_of_attention_does_not_concern_a_plan(six_layers, monkeypatch):
    """Megatron-Core would refuse the model that is built to be counted."""
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.setenv(name, "0")
    shown = console()
    plan_show.show(question(six_layers, world_size=2, parallel={"pp_size": 2}), shown)
    assert "States, GiB a GPU" in shown.export_text()


def test_every_number_has_an_origin(six_layers):
    asked = question(six_layers, world_size=8, parallel={"tp_size": 2, "ep_size": 8, "cp_size": 2})
    shown = console()
    plan = plan_show.show(asked, shown, origins=True)
    lines = shown.export_text().splitlines()
    named = {name for line in lines if ": " in line for name in line.split(": ")[0].split(", ")}
    columns = {
        *plan_show.STATES.values(),
        *plan_show.ACTIVATIONS.values(),
        "in flight",
        "buffers",
        "unusable",
    }
    times = {"compute", "tp", "ep", "cp", "dp", "bubble", "optimizer", "mfu", "days", "disk"}
    assert named >= columns | times
    assert named >= {"checkpoint", "h100-80gb", "network"}
    speed = Speed(asked.cluster, load_kernels(asked.cluster.card))
    units = speed.units(plan.workload)
    assert set(units) == {"dense", "moe", "head"}
    for unit in units.values():
        for row in unit.rows:
            assert row.seconds.origin, row.name
            assert any(row.name in line for line in lines) or not row.seconds.forward


def test_a_node_without_room_for_what_is_offloaded_is_told(six_layers):
    asked = question(
        six_layers, world_size=8, parallel={"tp_size": 8, "ep_size": 8},
        optimizer={"offload_fraction": 1.0},
    )  # fmt: skip
    small = replace(asked, cluster=replace(asked.cluster, host_memory_gib=100.0))
    texts = []
    for one in (asked, small):
        shown = console()
        plan = plan_show.show(one, shown)
        texts.append(shown.export_text())
    assert "lacks" not in texts[0]
    # 16 bytes a parameter wait in host memory, of which nine tenths are given.
    lacks = plan.host_gib - 90
    assert f"a node lacks {lacks:,.0f} GiB of host memory" in texts[1]
    assert plan.host_gib > 100


WHOLE_LAYERS = {"recompute": "selective", "recompute_modules": ["moe"]}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({}, "; experts.overlap_all_to_all may hide them\n"),
        (
            {"memory": WHOLE_LAYERS, "train": {"global_batch_size": 64}},
            "; experts.overlap_all_to_all may hide them (needs memory.recompute_modules without "
            "moe, another micro-batch to compute meanwhile)\n",
        ),
        (
            {"experts": {"overlap_all_to_all": True}},
            ", as if nothing hid them: what their overlap gains was not measured\n",
        ),
    ],
)
def test_all_to_alls_that_take_much_of_a_step_are_pointed_out(six_layers, sections, said):
    shown = Console(record=True, width=300)
    apart = {
        "parallel": {"ep_size": 64},
        "memory": {"recompute": "none"},
        "train": {"global_batch_size": 128},
    }
    plan = plan_show.show(question(six_layers, **(apart | sections)), shown)
    assert plan.step.ep > 0.2 * plan.step.total
    share = f"all-to-alls take {plan.step.ep / plan.step.total:.0%} of the step"
    assert share + said in shown.export_text()
    shown = Console(record=True, width=300)
    near = question(six_layers, world_size=8, parallel={"ep_size": 8})
    plan = plan_show.show(near, shown)
    assert plan.step.ep < 0.2 * plan.step.total
    assert "overlap_all_to_all" not in shown.export_text()


def test_two_jobs_are_compared_with_the_settings_that_differ(six_layers):
    shown = console()
    other = question(six_layers, optimizer={"moments": "bf16"})
    plan_show.compare([question(six_layers), other], shown, names=["a", "b"])
    text = shown.export_text()
    assert "optimizer.moments" in text
    assert "parallel.tp_size" not in text
    assert "tokens/s/GPU" in text


@pytest.mark.parametrize(
    ("model", "sections", "message"),
    [
        (None, {}, "no config.json there; give --model HF_DIR, or --model deepseek-v3"),
        (plan_show.PUBLISHED, {"parallel": {"tp_size": 128}}, "world size 64 is not tp_size.128."),
        (plan_show.PUBLISHED, {"train": {"global_batch_size": 63}}, "63 is not micro_batch_size"),
    ],
)
def test_a_job_that_cannot_run_says_why(model, sections, message):
    with pytest.raises(ValueError, match=message):
        plan_show.plan_of(question(model, **sections), console())


def test_the_published_model_is_planned_where_its_files_are_not():
    assert plan_show._architecture(question(plan_show.PUBLISHED)) == DEEPSEEK_V3


@pytest.mark.parametrize(
    ("name", "memory_gib", "card"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "h100-80gb"),
        ("NVIDIA H200", 139.8, "h200-141gb"),
        ("NVIDIA H20", 95.1, "h20-96gb"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "a100-80gb"),
        ("Unheard-of 9000", 48.0, None),
    ],
)
def test_a_device_is_known_by_its_name(name, memory_gib, card):
    assert plan_job.card_of(name, memory_gib) == card


def test_a_stage_shows_its_fullest_rank_beside_the_plan():
    peaks = [(0, 40.0), (0, 41.5), (1, 38.0)]
    assert plan_job.peak_texts(peaks, {0: 41.0}) == [
        "stage 0: 41.5 GiB at most, 41.0 planned",
        "stage 1: 38.0 GiB at most",
    ]


def test_a_training_plans_itself_and_tells_what_it_took(monkeypatch, six_layers):
    """On a card that is not there; the plan is made by a process of its own, as in a training."""
    groups = SimpleNamespace(rank=0, world_size=8, pp_rank=0, device=torch.device("cuda"))
    h100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=79.1 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: h100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 41 * GIB)
    asked = job(model={"hf_dir": six_layers}, parallel={"pp_size": 2, "ep_size": 4})
    said: list[str] = []
    begun = plan_job.begin(asked, groups)
    assert begun is not None
    planned = plan_job.finish(begun, said.append)
    assert set(planned) == {0, 1}
    assert "8 x h100-80gb, PP2 EP4" in said[0]
    assert "tokens/s/GPU" in said[0]
    others = [(0, 40.0)] * 4 + [(1, 30.0)] * 3

    def gather(everyone, mine):
        everyone[:] = [mine, *others]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    plan_job.tell_peaks(planned, groups, said.append)
    assert said[1:] == [
        f"stage 0: 41.0 GiB at most, {planned[0]:.1f} planned; "
        f"stage 1: 30.0 GiB at most, {planned[1]:.1f} planned"
    ]
    on_cpu = SimpleNamespace(rank=0, device=torch.device("cpu"))
    assert plan_job.begin(asked, on_cpu) is None
    plan_job.tell_peaks({}, on_cpu, said.append)
    assert len(said) == 2


def planning(code: str) -> plan_job.Planning:
    folder = tempfile.TemporaryDirectory()
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(Path(folder.name) / "plan.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return plan_job.Planning(process, folder)


WRITES = (
    "import sys; print('a table'); open(sys.argv[1], 'w').write("
    '\'{"stages": [{"pp_rank": 0, "allocated_gib": 12.5}]}\')'
)


@pytest.mark.parametrize(
    ("code", "text", "found"),
    [
        (WRITES, "a table", {0: 12.5}),
        ("import sys; print('error: no'); sys.exit(2)", "error: no", {}),
        ("import time; time.sleep(60)", "no plan within 1 s", {}),
    ],
    ids=["made", "refused", "too slow"],
)
def test_a_training_tells_its_plan_and_goes_on_without_one(monkeypatch, code, text, found):
    monkeypatch.setattr(plan_job, "PATIENCE_S", 1 if "sleep" in code else 60)
    said: list[str] = []
    begun = planning(code)
    assert plan_job.finish(begun, said.append) == found
    assert said == [text]
    assert not Path(begun.folder.name).exists()
    assert plan_job.finish(None, said.append) == {}
