"""The watchdog in a process of its own: what it writes, and when it lets go."""

import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, time
from pathlib import Path
from megatron_dsv3.train.watchdog import watchdog

def waits_for_ever():
    time.sleep(60)

with watchdog(Path(sys.argv[1]), 3, float(sys.argv[2])) as dog:
    for _ in range(4):
        time.sleep(0.3)
        dog.progress()
    if sys.argv[3] == "hang":
        waits_for_ever()
    if sys.argv[3] == "pause":
        dog.pause()
        time.sleep(1.2)
    if sys.argv[3] == "crash":
        import ctypes
        ctypes.string_at(0)
    print("done")
"""


def _run(log_dir: Path, what: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", SCRIPT, str(log_dir), "0.9", what]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_no_progress_ends_the_process_with_its_stack_written(tmp_path):
    done = _run(tmp_path, "hang")
    assert done.returncode == -signal.SIGALRM
    assert "done" not in done.stdout
    stack = (tmp_path / "stacks" / "rank_00003.txt").read_text()
    assert "Timeout" in stack
    assert "in waits_for_ever" in stack


def test_progress_in_time_and_pauses_leave_nothing(tmp_path):
    done = _run(tmp_path, "pause")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert not (tmp_path / "stacks").exists()


def test_a_second_hang_does_not_erase_the_first(tmp_path):
    _run(tmp_path, "hang")
    _run(tmp_path, "hang")
    assert (tmp_path / "stacks" / "rank_00003.txt").read_text().count("Timeout") == 2


def test_a_crash_leaves_its_stack_too(tmp_path):
    assert _run(tmp_path, "crash").returncode < 0
    assert "Segmentation fault" in (tmp_path / "stacks" / "rank_00003.txt").read_text()
