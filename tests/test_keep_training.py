"""How the scripts keep a training going: attempts, signals, spares.

Python is a stand-in that does as it is told.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Its words are those of torchrun, or of a step of the pre-flight. What it does is a line of bash
# from the file `train`, `report`, `choose` or `links`: the n-th time the n-th.
PYTHON = r"""#!/usr/bin/env bash
set -u
words="$*" host=${DSV3_HOST:-?}
after() { [[ $words =~ $1\ ([^ ]+) ]] && echo "${BASH_REMATCH[1]}"; }
case $words in
*"--step report"*) kind=report ;;
*"--step choose"*) kind=choose ;;
*"--step links"*) kind=links ;;
*) kind=train ;;
esac
echo "$kind on $host" >>"$STUB/calls"
number=$(grep -c "^$kind" "$STUB/calls")
dir=$(after --dir) nodes=$(after --nodes) needed=$(after --needed)
line=$(sed -n "${number}p" "$STUB/$kind" 2>/dev/null)
eval "${line:-true}"
"""
CHOOSE = (
    "good=(); for n in ${nodes//,/ }; do "
    '[[ ! -f $dir/$n.json || -f $dir/$n.slow ]] || good+=("$n"); done; '
    '((${#good[@]} >= needed)) || exit 2; (IFS=,; echo "${good[*]:0:$needed}") >"$dir/nodes"'
)
PROGRAMS = (
    *("bash", "sh", "env", "cat", "date", "dirname", "hostname", "mkdir", "realpath", "cp", "rm"),
    *("sed", "sleep", "sort", "find", "wc", "grep", "id", "touch"),
)


@pytest.fixture
def stub(tmp_path):
    """A folder for the stand-in's lines, and a function that gives the command of a script."""
    place = tmp_path / "stub"
    place.mkdir()
    python = place / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    (place / "calls").touch()
    for kind in ("report", "choose", "links", "train"):
        (place / kind).touch()
    yield place
    # Whatever a failed test left running knows the folder.
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"STUB={place}" in path.read_text().split("\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)


def _start(stub: Path, *words: str, script: str = "train_dsv3_671b.sh") -> subprocess.Popen:
    programs = stub / "bin"
    programs.mkdir(exist_ok=True)
    ssh = programs / "ssh"
    ssh.write_text('#!/bin/sh\nshift 3\nexec sh -c "$*"\n')
    ssh.chmod(0o755)
    for program in PROGRAMS:
        target = next(p for p in (Path("/usr/bin"), Path("/bin")) if (p / program).exists())
        if not (programs / program).exists():
            (programs / program).symlink_to(target / program)
    command = ["bash", str(EXAMPLES / script), *words, "--gpus-per-node=0", "--name=n"]
    command += ["--python", str(stub / "python"), "--job", str(EXAMPLES / "sft_small.yaml")]
    return subprocess.Popen(
        [*command, "--runs", str(stub)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={"PATH": str(programs), "STUB": str(stub), "HOME": str(stub), "TMPDIR": str(stub)},
    )


def _run(stub: Path, *words: str, **options: str) -> tuple[int, str]:
    process = _start(stub, *words, **options)
    said = process.communicate(timeout=60)[0]
    return process.returncode, said


def _calls(stub: Path) -> list[str]:
    return (stub / "calls").read_text().splitlines()


def _checkpoint(stub: Path, step: int) -> str:
    folder = stub / "n" / "checkpoints"
    return f"mkdir -p {folder}; echo {step} >{folder}/latest_checkpointed_iteration.txt"


ALONE = ("--here", "--no-preflight")


def test_a_failure_after_a_new_checkpoint_is_followed_by_another_attempt(stub):
    lines = [f"{_checkpoint(stub, 2)}; exit 1", f"{_checkpoint(stub, 4)}; exit 1", "exit 0"]
    (stub / "train").write_text("\n".join(lines))
    code, said = _run(stub, *ALONE)
    assert code == 0, said
    assert len(_calls(stub)) == 3
    assert "failed after checkpoint 4: started again" in said


def test_a_failure_that_made_no_progress_ends_it(stub):
    (stub / "train").write_text(f"{_checkpoint(stub, 2)}; exit 1\nexit 3")
    code, said = _run(stub, *ALONE)
    assert code == 3, said
    assert len(_calls(stub)) == 2
    assert "without a new checkpoint (newest: 2): not started again" in said


def test_a_run_that_asks_to_be_started_again_ends_with_75(stub):
    (stub / "train").write_text(
        f"{_checkpoint(stub, 2)}; touch {stub}/n/checkpoints/requeue; exit 1"
    )
    code, said = _run(stub, *ALONE)
    assert code == 75, said
    assert len(_calls(stub)) == 1


def test_what_an_earlier_run_asked_is_forgotten(stub):
    folder = stub / "n" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "requeue").write_text("2\n")
    (stub / "train").write_text("exit 1")
    assert _run(stub, *ALONE)[0] == 1


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_repeated_until_a_rank_hears_it(stub, number):
    """The rank, a child of what stands for torchrun, loads for a while with signals ignored."""
    wait = "while [[ ! -f $STUB/loaded ]]; do sleep 0.1; done"
    (stub / "rank.sh").write_text(f"touch $STUB/loading; {wait}; exec {sys.executable} $STUB/r.py")
    (stub / "r.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))\ntime.sleep(60)\n"
    )
    folder = stub / "n" / "checkpoints"
    (stub / "train").write_text(
        f"bash $STUB/rank.sh; code=$?; mkdir -p {folder}; echo $code >{folder}/requeue; exit 1"
    )
    process = _start(stub, *ALONE)
    _wait_for(stub / "loading", process)
    process.send_signal(number)
    time.sleep(0.5)
    (stub / "loaded").touch()
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 75, said
    assert (folder / "requeue").read_text() == "75\n"
    assert f"{number.name}: the run is told to save and stop" in said


def test_a_signal_during_the_pre_flight_starts_no_training(stub):
    (stub / "report").write_text("touch $STUB/reporting; sleep 2; exit 0")
    process = _start(stub, "--here")
    _wait_for(stub / "reporting", process)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 75, said
    assert not [call for call in _calls(stub) if call.startswith("train")]


def _wait_for(path: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


HOSTS = {"script": "train_dsv3_pdsh.sh"}
REPORT = "[[ $host == a ]] || echo {} >$dir/$host.json"  # a cannot start


def test_a_spare_takes_the_place_of_a_host_that_reports_nothing(stub):
    (stub / "report").write_text("\n".join([REPORT] * 3))
    (stub / "choose").write_text(CHOOSE)
    code, said = _run(stub, "a,b,c", "--spares=1", **HOSTS)
    assert code == 0, said
    calls = _calls(stub)
    assert sorted(calls[:3]) == ["report on a", "report on b", "report on c"]
    assert calls[3] == "choose on b"
    assert sorted(calls[4:]) == ["links on b", "links on c", "train on b", "train on c"]


def test_a_host_with_slow_links_is_left_out_in_a_second_choice(stub):
    (stub / "report").write_text("\n".join(["echo {} >$dir/$host.json"] * 3))
    (stub / "choose").write_text(f"{CHOOSE}\n{CHOOSE}")
    (stub / "links").write_text("echo slow >$dir/b.slow; exit 2\n" * 2)
    code, said = _run(stub, "a,b,c", "--spares=1", **HOSTS)
    assert code == 0, said
    assert [call for call in _calls(stub) if call.startswith("train")] in (
        ["train on a", "train on c"],
        ["train on c", "train on a"],
    )


def test_without_spares_nothing_is_started(stub):
    (stub / "report").write_text("\n".join([REPORT] * 2))
    (stub / "choose").write_text(CHOOSE)
    code, said = _run(stub, "a,b", **HOSTS)
    assert code == 2, said
    assert not [call for call in _calls(stub) if call.startswith(("links", "train"))]
    (stub / "report").write_text("exit 1\n" * 4)
    code, said = _run(stub, "a,b", **HOSTS)
    assert code == 2
    assert "pre-flight: none of a,b reported anything" in said
