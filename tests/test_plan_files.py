"""`plan search` from outside: what it prints, and files that training takes as they are."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread
from small_job import write_chats, write_job, write_model

from megatron_dsv3.config.architecture import DEEPSEEK_V3, Architecture
from megatron_dsv3.config.job import load_job
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.plan.cards import cluster_of
from megatron_dsv3.plan.estimate import estimate
from megatron_dsv3.plan.job_files import JOB, PLACEMENT, SCRIPT, Inputs, write_files
from megatron_dsv3.plan.kernels import load_kernels
from megatron_dsv3.plan.layouts import RECOMPUTE, Request, layouts
from megatron_dsv3.plan.pictures import draw_memory, draw_timeline, parts
from megatron_dsv3.plan.records import GIB, Plan, Workload
from megatron_dsv3.plan.speed import Speed

SEARCH = (
    *("plan", "search", "--nodes", "1", "--gpus-per-node", "2", "--seq-length", "64"),
    *("--global-batch-size", "4", "--precision", "bf16", "--moments", "fp32"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def searched(run, model, tmp_path):
    """A search with files; the directory, and what was printed."""
    chats = write_chats(tmp_path / "it's chats.jsonl")
    directory = tmp_path / "plan"
    code, out, err = run(
        *(*SEARCH, "--model", model, "--data", chats, "--out", tmp_path / "out"),
        *("--write", directory),
    )
    assert code == 0, out + err
    return directory, out


def test_the_job_that_is_written_is_accepted_unchanged_by_a_dry_run(run, searched, tmp_path):
    directory, out = searched
    names = {path.name for path in directory.iterdir()}
    assert names == {JOB, PLACEMENT, SCRIPT, "memory.png", "timeline.png"}
    assert "layouts fit" in out
    assert "counted on the model" in out
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run("train", directory / JOB, "--dry-run", "--processes", "2")
    assert code == 0, err
    assert "2 processes of cuda" in out
    assert "this job can train" in out
    assert sorted(tmp_path.rglob("*")) == before, "a dry run writes nothing"
    job = load_job(directory / JOB)
    assert job.train.global_batch_size == 4
    assert job.parallel.stages in (directory / JOB).read_text()
    for letters in job.parallel.stages.split("|"):
        assert letters in (directory / PLACEMENT).read_text()


def test_a_dry_run_says_what_is_wrong_with_the_job(run, searched):
    job = searched[0] / JOB
    for override, message in (
        ("parallel.ep_size=8", "world size 2 is not etp_size(1) * ep_size(8)"),
        ("data.paths=[nowhere.jsonl]", "nowhere.jsonl"),
        ("train.global_batch_size=5", "global_batch_size 5 is not"),
    ):
        code, _, err = run("train", job, override, "--dry-run", "--processes", "2")
        assert code == 2
        assert message in err


def test_a_dry_run_of_a_job_for_cpus_builds_every_stage(run, model, tmp_path):
    chats = write_chats(tmp_path / "chats.jsonl")
    job = write_job(tmp_path, model, chats, parallel={"pp_size": 2, "tp_size": 2})
    code, out, err = run("train", job, "--dry-run", "--processes", "4")
    assert code == 0, err
    assert "4 processes of cpu" in out
    assert not (tmp_path / "out").exists()


def test_the_script_is_clean_and_asks_for_the_machines(searched):
    directory, _ = searched
    bin_dir = Path(sys.executable).parent
    for tool in (["shellcheck"], ["shfmt", "-i", "4", "-d"], ["bash", "-n"]):
        program = bin_dir / tool[0] if (bin_dir / tool[0]).exists() else tool[0]
        done = subprocess.run(
            [program, *tool[1:], directory / SCRIPT], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("nodes", "states", "wanted"),
    [
        (2, "bf16 moments, fp8 weights", lambda work: work.parallel.pp_size == 2),
        (4, "half offloaded", lambda work: work.parallel.etp_size == 2),
        (2, "bf16 moments", lambda work: work.memory.offload_activations),
    ],
    ids=["fp8 weights", "cut experts", "offloaded activations"],
)
def test_a_dry_run_accepts_what_is_written_of_any_setting(
    run, model, tmp_path, nodes, states, wanted
):
    cluster = cluster_of("h100-80gb", gpus_per_node=4)
    request = Request(
        arch=Architecture.from_hf(model), cluster=cluster, nodes=nodes, seq_length=64,
        global_batch_size=16, precisions=("fp8",), states=(states,),
        recompute=tuple(RECOMPUTE),
    )  # fmt: skip
    layout = next(layout for layout in layouts(request) if wanted(layout.workload))
    work = layout.with_states(states)
    step = Speed(cluster, load_kernels(cluster.card)).step(work)
    plan = Plan(workload=work, cluster=cluster, stages=estimate(work), step=step)
    inputs = Inputs(
        hf_dir=model, data=write_chats(tmp_path / "c.jsonl"), is_store=False,
        out=tmp_path / "out", launcher=tmp_path / "train.sh",
    )  # fmt: skip
    write_files(plan, inputs, tmp_path / "plan")
    job = load_job(tmp_path / "plan" / JOB)
    sections = (job.parallel, job.precision, job.memory, job.optimizer)
    assert sections == (work.parallel, work.precision, work.memory, work.optimizer)
    processes = str(request.world_size)
    code, _, err = run("train", tmp_path / "plan" / JOB, "--dry-run", "--processes", processes)
    assert code == 0, err


def test_the_script_hands_the_job_to_the_launcher(searched, tmp_path):
    directory, _ = searched
    (tmp_path / "sbatch").write_text("")
    (tmp_path / "sbatch").chmod(0o755)
    done = subprocess.run(
        ["bash", directory / SCRIPT, "--dry-run", "--time", "1:00:00", "optimizer.lr=1e-6"],
        capture_output=True, text=True, check=False, cwd="/",
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    submission, _, steps = done.stdout.partition("# in the job")
    for word in ("--nodes=1 ", "--gpus-per-node=2 ", "--time=1:00:00 ", "--requeue "):
        assert word in submission
    # The launcher trains a copy, which nobody edits while the job waits.
    copy = directory / "runs" / "out" / JOB
    assert f"cp {directory / JOB} {copy}" in submission
    assert f"--job={copy}" in submission
    assert "preflight" in steps
    for setting in (f"output.dir={tmp_path / 'out'}", "optimizer.lr=1e-6"):
        assert setting in steps
    # The last of two settings of a name counts.
    assert steps.rindex(f"output.dir={tmp_path / 'out'}") > steps.index("runs/out/model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "search"), "give one of --nodes N and --min-gpus"),
        ((*SEARCH, "--gpu", "h100"), "no card 'h100'; known are h100-80gb"),
        ((*SEARCH, "--write", "x"), "--write needs --model, --data, --out as well"),
        ((*SEARCH, "--gpu", "a100-80gb", "--precision", "fp8"), "a100-80gb has no FP8"),
        ((*SEARCH, "--host-memory", "much"), "'much': expected a size such as"),
        ((*SEARCH, "--seq-length", "1000000"), "exceeds the model's max_position_embeddings"),
        (
            ("plan", "search", "--nodes", "2", "--seq-length", "4096", "--precision", "bf16"),
            r"2 nodes lack [\d.]+ GiB a card at 4k",
        ),
    ],
)
def test_what_a_user_can_do_wrong_is_said_in_one_message(run, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2
    assert re.search(message, err), err
    assert "Traceback" not in out + err


def test_a_directory_that_holds_something_is_left_alone(run, model, tmp_path):
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "mine").write_text("")
    code, _, err = run(
        *(*SEARCH, "--model", model, "--data", write_chats(tmp_path / "c.jsonl")),
        *("--out", tmp_path / "out", "--write", tmp_path / "plan"),
    )
    assert code == 2
    assert "not empty" in err
    assert [path.name for path in (tmp_path / "plan").iterdir()] == ["mine"]


def test_min_gpus_names_the_fewest_and_origins_are_explained(run, model):
    code, out, err = run(
        *("plan", "search", "--min-gpus", "--gpus-per-node", "2", "--seq-length", "64"),
        *("--model", model, "--precision", "bf16", "--explain", "--gpu", "h20-96gb", "--no-count"),
    )
    assert code == 0, err
    assert "1 nodes of 2 x h20-96gb" in out
    assert "transferred from h100-80gb" in out
    assert "speeds are projected" in out
    assert "DiffSynth-Studio issue 1238" in out


def test_pictures_show_what_the_plan_holds(tmp_path):
    cluster = cluster_of("h100-80gb")
    speed = Speed(cluster, load_kernels(cluster.card))
    work = Workload(
        arch=DEEPSEEK_V3, parallel=Parallel(tp_size=8, pp_size=8, vpp_size=2, ep_size=8),
        world_size=64, seq_length=4096, num_micro_batches=16,
    )  # fmt: skip
    plan = Plan(workload=work, cluster=cluster, stages=estimate(work), step=speed.step(work))
    updating = replace(plan.stages[0], states=replace(plan.stages[0].states, update=90 * GIB))
    for stage in (*plan.stages, updating):
        assert sum(parts(stage).values()) == pytest.approx(stage.total / GIB)
    draw_memory(plan, tmp_path / "memory.png")
    draw_timeline(speed.timeline(work), tmp_path / "timeline.png")
    for name in ("memory.png", "timeline.png"):
        image = imread(tmp_path / name)
        colours = {tuple(pixel) for row in image[::7, ::7] for pixel in row}
        assert image.shape[1] > 600
        assert len(colours) > 5, f"{name} is blank"
