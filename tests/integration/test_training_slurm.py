"""The script that trains, on a real slurm of four virtual nodes, disturbed in every way.

Each run ends with the weights of one that nothing disturbed. All nodes are this machine.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from environment import ROOT, apt_install, free_port
from training import assert_same, options, write_inputs

SLURM = Path(__file__).with_name("slurm.sh")
SCRIPT = ROOT / "examples" / "train_dsv3_671b.sh"
PATIENCE_S = 240


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Environment of a cluster of four nodes."""
    apt_install(("slurmctld", "slurm-wlm"), ("munged", "munge"))
    root = tmp_path_factory.mktemp("slurm")
    up = ["bash", str(SLURM), "up", str(root), "4", "1", str(free_port())]
    try:
        done = subprocess.run(up, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        loopback = {"GLOO_SOCKET_IFNAME": "lo", "TORCHDYNAMO_DISABLE": "1"}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "DSV3"))}
        yield kept | loopback | {"SLURM_CONF": str(root / "slurm.conf")}
    finally:
        subprocess.run(["bash", str(SLURM), "down", str(root)], check=False, timeout=120)


class Runs:
    """Starts the script as a user does and looks at what comes of it."""

    def __init__(self, inputs: Path, runs: Path, environment: dict[str, str]) -> None:
        self.inputs, self.runs, self.environment = inputs, runs, environment

    def command(self, name: str, *words: str) -> list[str]:
        return ["bash", str(SCRIPT), *options(self.inputs, self.runs, name), *words]

    def submit(self, name: str, *words: str) -> str:
        """Number of the job."""
        said = self.call(self.command(name, *words))
        assert said.startswith("Submitted batch job "), said
        return said.split()[3]

    def call(self, command: list[str]) -> str:
        return subprocess.check_output(
            command, text=True, env=self.environment, cwd=self.runs, timeout=300
        )

    def log(self, name: str) -> str:
        return "".join(path.read_text() for path in (self.runs / name).glob("slurm-*.log"))

    def state(self, job: str) -> str:
        show = ["squeue", "--noheader", "--states=all", "--jobs", job, "--format", "%T"]
        return self.call(show).strip()

    def wait_for(self, text: str, name: str) -> None:
        self._until(lambda: text in self.log(name), name)

    def wait_until_over(self, job: str, name: str) -> str:
        """Its last state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        self._until(lambda: self.state(job) in over, name)
        return self.state(job)

    def _until(self, is_so, name: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < end, self.log(name)[-6000:]
            time.sleep(0.2)

    def assert_same(self, name: str, reference: Path) -> None:
        assert_same(self.runs / name / "model", reference)


@pytest.fixture(scope="module")
def runs(inputs, cluster, tmp_path_factory) -> Runs:
    return Runs(inputs, tmp_path_factory.mktemp("runs"), cluster)


@pytest.fixture(scope="module")
def undisturbed(runs) -> Path:
    """Model of two processes that the script starts here, without slurm."""
    words = ("--here", "--processes=2", "--no-preflight", f"--port={free_port()}")
    runs.call(runs.command("here", *words))
    return runs.runs / "here" / "model"


def _go_on_to_the_end(runs: Runs, job: str, name: str, undisturbed: Path) -> None:
    assert runs.wait_until_over(job, name) == "COMPLETED", runs.log(name)[-6000:]
    log = runs.log(name)
    assert "start 2, on node" in log
    assert "resumed from" in log
    assert not (runs.runs / name / "checkpoints" / "requeue").exists()
    runs.assert_same(name, undisturbed)


def test_four_nodes_are_checked_and_train_to_the_end(runs):
    """Its peer is torchrun with four processes, without any of this."""
    job = runs.submit("whole", "--nodes=4")
    assert runs.wait_until_over(job, "whole") == "COMPLETED", runs.log("whole")[-6000:]
    log = runs.log("whole")
    table = log[log.index("Pre-flight") : log.index("step 1/")]
    for node in ("node1", "node2", "node3", "node4"):
        assert node in table
    assert table.count("fit") == 4
    assert "all-to-all of tokens (ep): slowest" in table
    logs = sorted((runs.runs / "whole" / "logs").glob("rank_*.log"))
    assert [path.name for path in logs] == [f"rank_{rank:05}.log" for rank in range(4)]
    assert "step 12/12" in logs[0].read_text()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    command += ["-m", "megatron_dsv3.cli", "train", str(runs.inputs / "job.yaml")]
    peer = runs.runs / "peer"
    runs.call([*command, f"output.dir={peer}/model", f"log.dir={peer}/log"])
    runs.assert_same("whole", peer / "model")


def test_a_warned_job_saves_is_requeued_and_ends_the_same(runs, undisturbed):
    """As slurm warns of the time limit (--signal=B:USR1@300): the batch script alone gets it."""
    job = runs.submit("warned", "--nodes=2", "--no-preflight")
    runs.wait_for("step 3/", "warned")
    runs.call(["scancel", "--batch", "--signal=USR1", job])
    runs.wait_for("requeued", "warned")
    assert "SIGUSR1: stopped after step" in runs.log("warned")
    _go_on_to_the_end(runs, job, "warned", undisturbed)


def test_a_preempted_job_saves_waits_and_ends_the_same(runs, undisturbed):
    job = runs.submit("preempted", "--nodes=2", "--no-preflight")
    runs.wait_for("step 3/", "preempted")
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive"]
    other = runs.call([*urgent, "--output=/dev/null", "--wrap=sleep 3"]).strip()
    assert runs.wait_until_over(other, "preempted") == "COMPLETED"
    assert "stopped after step" in runs.log("preempted")
    _go_on_to_the_end(runs, job, "preempted", undisturbed)


def test_a_node_that_goes_down_is_replaced(runs, undisturbed):
    job = runs.submit("down", "--nodes=2", "--no-preflight")
    runs.wait_for("checkpoints/iter_0000002", "down")
    nodes = runs.call(["squeue", "--noheader", "--jobs", job, "--format", "%N"]).strip()
    last = runs.call(["scontrol", "show", "hostnames", nodes]).split()[-1]
    update = ["scontrol", "update", f"nodename={last}"]
    runs.call([*update, "state=down", "reason=test"])
    try:
        _go_on_to_the_end(runs, job, "down", undisturbed)
        second = runs.log("down").rpartition(", on node")[2].splitlines()[0]
        assert last not in runs.call(
            ["scontrol", "show", "hostnames", f"node{second.split(';')[0]}"]
        )
    finally:
        runs.call([*update, "state=resume"])


def test_a_cancelled_job_leaves_a_whole_checkpoint_and_stays_away(runs, undisturbed):
    job = runs.submit("cancelled", "--nodes=2", "--no-preflight")
    runs.wait_for("step 3/", "cancelled")
    runs.call(["scancel", job])
    assert runs.wait_until_over(job, "cancelled") == "CANCELLED"
    folder = runs.runs / "cancelled" / "checkpoints"
    step = int((folder / "latest_checkpointed_iteration.txt").read_text())
    assert step >= 2
    verify = [sys.executable, "-m", "megatron_dsv3.cli", "verify"]
    runs.call([*verify, str(folder / f"iter_{step:07}")])
    time.sleep(8)  # what is requeued would be eligible by now
    assert runs.state(job) == "CANCELLED"
    again = runs.submit("cancelled", "--nodes=2", "--no-preflight")
    assert runs.wait_until_over(again, "cancelled") == "COMPLETED", runs.log("cancelled")[-6000:]
    assert f"after step {step}" in runs.log("cancelled")
    runs.assert_same("cancelled", undisturbed)


def test_a_rank_that_dies_is_started_again_in_the_same_allocation(runs, undisturbed):
    job = runs.submit("killed", "--nodes=2", "--no-preflight")
    runs.wait_for("checkpoints/iter_0000002", "killed")
    os.kill(_process_of_rank(1, runs.runs / "killed"), signal.SIGKILL)
    assert runs.wait_until_over(job, "killed") == "COMPLETED", runs.log("killed")[-6000:]
    log = runs.log("killed")
    assert "failed after checkpoint" in log
    assert "resumed from" in log
    assert "start 2" not in log
    runs.assert_same("killed", undisturbed)


def _process_of_rank(rank: int, run: Path) -> int:
    """The first of that rank's processes; its writers come after it."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_text().split("\0")
            environment = (place / "environ").read_text().split("\0")
        except OSError:  # gone, or of somebody else
            continue
        if str(run / "job.yaml") in words and f"RANK={rank}" in environment:
            found.append(int(place.name))
    return min(found)


def test_a_node_that_cannot_start_is_named_and_a_spare_takes_its_place(runs, undisturbed):
    python = runs.runs / "python_but_on_node1"
    python.write_text(
        f'#!/bin/sh\n[ "$SLURMD_NODENAME" != node1 ] || exit 1\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    words = ("--nodes=1", "--processes=2", f"--python={python}")
    alone = runs.submit("alone", *words, "--sbatch=--nodelist=node1")
    assert runs.wait_until_over(alone, "alone") == "FAILED"
    assert "pre-flight: none of node1 reported anything" in runs.log("alone")
    assert "Placement" not in runs.log("alone")
    job = runs.submit("spare", *words, "--spares=1", "--sbatch=--exclude=node[3-4]")
    assert runs.wait_until_over(job, "spare") == "COMPLETED", runs.log("spare")[-6000:]
    assert "node1" in runs.log("spare")
    assert "reported nothing; see what it wrote to the log" in runs.log("spare")
    runs.assert_same("spare", undisturbed)


def test_more_nodes_than_there_are_are_refused_by_slurm(runs):
    done = subprocess.run(
        runs.command("many", "--nodes=9"),
        capture_output=True,
        text=True,
        env=runs.environment,
        check=False,
        timeout=60,
    )
    assert done.returncode != 0
    assert "More processors requested than permitted" in done.stderr or (
        "Requested node configuration is not available" in done.stderr
    ), done.stderr
