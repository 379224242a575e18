"""Runs that are killed, and runs that meet: a store is complete, or made anew by the next run."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import traceback

import psutil
import pytest
from chat_cases import HF_DIR, assistant, user
from prepare_cases import GOOD, run, samples_of, write_rows

from megatron_dsv3.data import prepare, report_files
from megatron_dsv3.data.manifest import read_manifest

SECONDS = 90


FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def kill_self(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_before(number, folder, target, path):
    """Runs `prepare` in a child that is killed before its n-th deed to a file of the folder."""
    child = os.fork()
    if child == 0:
        deeds = []

        def count(event, arguments):
            if event in FILE_EVENTS and str(arguments[0]).startswith(str(folder)):
                deeds.append(event)
                if len(deeds) == number:
                    kill_self()

        sys.addaudithook(count)
        try:
            run(target, path, replace=True)
        except BaseException:  # the tests after this one are the parent's
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), f"the child before deed {number} ended with {code}"
    return code != 0


def test_a_run_killed_at_any_moment_leaves_a_whole_store_or_none(tmp_path, monkeypatch):
    """Killed before the first file that it opens, makes, renames or removes; then the next."""
    monkeypatch.setattr(report_files, "PICTURES", {})
    monkeypatch.setattr(prepare, "tokenizer_fingerprint", lambda _: "")
    old = write_rows(tmp_path / "old.jsonl", GOOD)
    new = write_rows(tmp_path / "new.jsonl", GOOD, [user("r"), assistant("b")])
    target = tmp_path / "store"
    run(target, old)
    found = []
    for number in itertools.count(1):
        killed = killed_before(number, tmp_path, target, new)
        manifest = read_manifest(target)
        found.append(manifest and manifest.num_samples)
        if manifest:
            assert len(samples_of(target)) == manifest.num_samples
        run(target, old, replace=True)
        assert {path.name for path in tmp_path.iterdir()} == {"old.jsonl", "new.jsonl", "store"}
        assert len(samples_of(target)) == 1
        if not killed:
            break
    # The old store, for one moment none, then the new one.
    assert len(found) > 20
    assert [n for n, _ in itertools.groupby(found)] == [1, None, 2]
    assert found.count(None) == 1


@pytest.mark.slow
def test_two_runs_on_one_store_and_workers_without_a_parent(tmp_path):
    """One run of the command, with workers: another is refused, and a kill ends them all."""
    chats, small = tmp_path / "chats.jsonl", write_rows(tmp_path / "small.jsonl", GOOD)
    line = json.dumps({"messages": [user("q " * 2000), assistant("a " * 2000)]}) + "\n"
    chats.write_text(line * 10_000)
    target = tmp_path / "store"
    command = (
        *(sys.executable, "-m", "megatron_dsv3.cli", "prepare", chats, "--model", HF_DIR),
        *("--out", target, "--workers", "2"),
    )
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE)
    try:
        wait_for(lambda: size_of(tmp_path / "store.unfinished" / "tokens.bin") > 1 << 20, process)
        with pytest.raises(ValueError, match=r"another process is writing this store"):
            run(target, small)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
    finally:
        process.kill()
        process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []
    assert not target.exists()
    run(target, small)
    assert len(samples_of(target)) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"chats.jsonl", "small.jsonl", "store"}


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def wait_for(condition, process):
    end = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < end, "nothing was written in time"
        time.sleep(0.05)


def test_a_worker_that_dies_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", *[GOOD] * 3)
    with pytest.raises(ValueError, match=r"a worker died; was it out of memory"):
        run_with_dying_worker(tmp_path / "store", path, monkeypatch)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def run_with_dying_worker(target, path, monkeypatch):
    from megatron_dsv3.data import workers

    # Pickled by its name, so the worker finds this very function.
    monkeypatch.setattr(workers, "_work", kill_self)
    run(target, path, num_workers=2)


def test_a_complete_store_is_replaced_only_on_demand(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", GOOD)
    run(tmp_path / "store", path)
    with pytest.raises(ValueError, match=r"store: holds a complete store already"):
        run(tmp_path / "store", path)
    run(tmp_path / "store", path, replace=True)
    assert len(samples_of(tmp_path / "store")) == 1


def test_a_run_imports_no_torch(tmp_path):
    """It would take 500 MB of the process that reads and writes."""
    chats = write_rows(tmp_path / "a.jsonl", GOOD)
    script = (
        "import sys; from megatron_dsv3.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    options = ("--model", HF_DIR, "--out", tmp_path / "store", "--workers", "1")
    command = (sys.executable, "-c", script, "prepare", chats, *options)
    subprocess.run(list(map(str, command)), check=True, timeout=SECONDS, capture_output=True)


def test_fewer_blocks_are_on_their_way_the_longer_their_rows_are():
    from megatron_dsv3.data import workers

    for num_bytes, most in ((1 << 19, 6), (3 << 20, 3), (15 << 20, 2)):
        sent = 0
        while not workers._are_enough(sent, sent * num_bytes, 2):
            sent += 1
        assert sent == most
