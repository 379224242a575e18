"""What the scripts that train over nodes would run, word by word; nothing is started."""

import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SLURM, PDSH = (ROOT / "examples" / f"train_dsv3_{name}.sh" for name in ("671b", "pdsh"))
NODE = str(ROOT / "examples" / "cluster" / "node.sh")
STARTS = ("mkdir ", "cp ", "sbatch ", "srun ", "bash ", "on_hosts ")


@pytest.fixture
def script(tmp_path):
    """Runs a script in an empty folder on a base system: exit code, words of each line, errors."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text("#!/bin/sh\nexit 1\n")
    (programs / "sbatch").chmod(0o755)
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(tmp_path)}
    (tmp_path / "here").mkdir()

    def run(path: Path, *words: str, **variables: str) -> tuple[int, list[list[str]], str]:
        done = subprocess.run(
            ["bash", str(path), *words],
            capture_output=True,
            text=True,
            check=False,
            env=environment | variables,
            cwd=tmp_path / "here",
            timeout=60,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith(STARTS)]
        assert list((tmp_path / "here").iterdir()) == [], "a dry run writes nothing"
        return done.returncode, [shlex.split(line) for line in lines], done.stderr

    return run


def _after(words: list[str], word: str) -> str:
    return words[words.index(word) + 1]


def test_on_a_login_node_it_would_submit_itself(script, tmp_path):
    words = ("--dry-run", "--sbatch", "--partition=h100", "optimizer.lr=1e-6")
    code, lines, errors = script(SLURM, *words)
    assert (code, errors) == (0, "")
    question, mkdir, cp, submit, report, choose, links, train = lines
    assert question == [*submit[: len(question) - 2], "--test-only", str(SLURM)]
    run = tmp_path / "here" / "runs" / "sft-671b"
    assert mkdir == ["mkdir", "-p", f"{run}/logs", f"{run}/preflight"]
    assert cp == ["cp", str(ROOT / "examples" / "sft_671b.yaml"), f"{run}/job.yaml"]
    assert submit[0] == "sbatch"
    options = {"--nodes=32", "--gpus-per-node=8", "--requeue", "--signal=B:USR1@300", "--exclusive",
               "--open-mode=append", "--job-name=sft-671b", f"--output={run}/slurm-%j.log",
               "--partition=h100", "--dependency=singleton"}  # fmt: skip
    assert options <= set(submit[: submit.index(str(SLURM))])
    assert "optimizer.lr=1e-6" in submit[submit.index(str(SLURM)) :]
    for line, step in ((report, "report"), (choose, "choose"), (links, "links")):
        assert line[0] == "srun"
        assert _after(line, "--step") == step
    for line in (report, links, train):
        assert {"--nodes=32", "--ntasks-per-node=1"} <= set(line)
    assert "--nodes=1" in choose
    expected = ["-m", "megatron_dsv3.cli", "train", f"{run}/job.yaml"]
    expected += [f"output.dir={run}/model", f"checkpoint.dir={run}/checkpoints"]
    assert train[train.index("ranks") + 2 :] == [
        *expected,
        f"log.dir={run}/log",
        "optimizer.lr=1e-6",
    ]
    assert train[train.index(NODE) + 2] == "8"


def test_what_is_submitted_is_what_was_said(script):
    """The job's own words give the same options again, whatever variables it finds."""
    said = ["--dry-run", "--nodes", "4", "--spares=2", "--model", "/m/with space", "--no-preflight"]
    _, [_, _, copy, submit, train], _ = script(
        SLURM, *said, DSV3_GPUS_PER_NODE="4", DSV3_NAME="mine"
    )
    assert {"--nodes=6", "--gpus-per-node=4", "--job-name=mine"} <= set(submit)
    assert "model.hf_dir=/m/with space" in train
    again = submit[submit.index(str(SLURM)) + 1 :]
    # The file that the dry run has not copied.
    again = [word.replace(copy[2], copy[1]) for word in again]
    _, [*_, submit2, train2], _ = script(
        SLURM, "--dry-run", *again, DSV3_NAME="other", DSV3_NODES="9"
    )
    assert (submit2, train2) == (submit, train)


def test_data_is_a_store_or_chat_files(script, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    (store / "manifest.json").write_text("{}")
    words = ("--dry-run", "--no-preflight", "--here", "--gpus-per-node=0")
    _, [*_, train], _ = script(SLURM, *words, "--data", str(store))
    assert {f"data.store={store}", "data.paths=[]"} <= set(train)
    _, [*_, train], _ = script(SLURM, *words, "--data", "/chats/it's.jsonl")
    assert {"data.store=null", "data.paths=['/chats/it''s.jsonl']"} <= set(train)


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        (
            ["--image", "/i/dsv3.sqsh"],
            ["--container-image=/i/dsv3.sqsh", "--no-container-mount-home", "bash", NODE],
        ),
        (
            ["--image", "/i/dsv3.sif"],
            ["apptainer", "exec", "--nv", "--bind", "/i/dsv3.sif", "bash", NODE],
        ),
        (
            ["--image", "megatron-dsv3", "--container", "docker"],
            [
                "docker",
                "run",
                "--ipc=host",
                "--gpus",
                "all",
                "--entrypoint",
                "bash",
                "megatron-dsv3",
                NODE,
            ],
        ),
    ],
    ids=["pyxis", "apptainer", "docker"],
)
def test_containers_get_what_they_need(script, container, expected):
    words = [
        "--dry-run",
        "--no-preflight",
        "--model",
        "/models/r1",
        "--mounts",
        "/a:/b",
        *container,
    ]
    code, [*_, train], _ = script(SLURM, *words)
    assert code == 0
    places = [train.index(word) for word in expected]
    assert places == sorted(places)
    mounts = " ".join(train[: train.index("ranks")])
    for mount in (f"{ROOT}:{ROOT}", "/models/r1:/models/r1", "/a:/b"):
        assert mount in mounts


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--node", "3"], "--node: no such option; --help lists them"),
        (["--nodes", "many"], "--nodes: expected a number, got 'many'"),
        (["--nodes"], "--nodes: expected a value"),
        (["--name", "a/b"], "--name: expected letters"),
        (["--job", "/no/job.yaml"], "/no/job.yaml: no such file"),
        (["--image", "x"], "which --container is it for"),
        (
            ["--container", "podman", "--image", "x"],
            "expected pyxis, apptainer or docker, got 'podman'",
        ),
        (["train"], "train: expected an option or a setting of the job"),
        (["--here", "--gpus-per-node=7"], "this machine has 0; 0 takes CPUs"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(script, words, said):
    code, _, errors = script(SLURM, *words)
    assert code == 2
    assert said in errors


def test_neither_a_refused_job_nor_one_that_is_done_leaves_a_folder(script, tmp_path):
    """The stand-in for sbatch refuses everything, and the fixture looks for leftovers."""
    assert script(SLURM)[0] == 1
    (tmp_path / "done").mkdir()
    code, _, errors = script(SLURM, f"output.dir={tmp_path}/done")
    assert code == 2
    assert f"{tmp_path}/done: the model is written already; take another --name" in errors


@pytest.mark.parametrize("path", [SLURM, PDSH])
def test_every_option_is_in_the_help(script, path):
    common = (ROOT / "examples" / "cluster" / "common.sh").read_text()
    options = common[common.index("declare -A opt=(") : common.index(")\noverrides=")]
    names = [word.partition("]")[0].replace("_", "-") for word in options.split("[")[1:]]
    assert len(names) > 15
    for word in ("--help", "-h"):
        done = subprocess.run(["bash", path, word], capture_output=True, text=True, check=False)
        assert done.returncode == 0
        listed = set(done.stdout.split())
        only_slurm = {"--nodes", "--time", "--warn-seconds"} if path == PDSH else set()
        assert {f"--{name}" for name in names} - only_slurm <= listed


def test_hosts_without_slurm_get_their_names(script):
    """pdsh or not: %h is the host's name, put in where the words reach it."""
    code, lines, errors = script(PDSH, "a,b", "--dry-run", "--no-preflight", "--gpus-per-node=2")
    assert code == 0, errors
    [_, _, [function, hosts, remote]] = lines
    assert (function, hosts) == ("on_hosts", "a,b")
    words = shlex.split(remote)
    assert "DSV3_HOST=%h" in words
    assert words[words.index("ranks") + 1] == "a,b"
    assert script(PDSH, "--dry-run")[0] == 2
    assert "pyxis needs slurm" in script(PDSH, "a", "--image", "i.sqsh")[2]
