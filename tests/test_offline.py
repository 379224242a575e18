"""The engine of the offline converter: resumed, shared, refused, and what it leaves behind."""

import mmap
import os
import random
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path

import file_direction
import pytest
import xxhash
from file_direction import Files
from hypothesis import given
from hypothesis import strategies as st

from megatron_dsv3.convert.journal import Entry, Journal
from megatron_dsv3.convert.memory import Budget, PeakMeter, resident_bytes
from megatron_dsv3.convert.offline import Share, Unit, convert, finalize

ONE = Budget(2_000_000_000, 1)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "3")
        outcome = convert(Files(), out, budget=ONE)
    assert outcome.is_finished
    assert outcome.written_bytes == 12 * 10_000
    # One thread each, whatever the machine offers: workers on the same cores wait for one another.
    assert outcome.reports["file-3"] == {"number": 3, "threads": 1}
    return contents(out)


def test_a_conversion_leaves_its_files_and_nothing_else(undisturbed):
    assert undisturbed.keys() == {"index", *(f"file-{number}" for number in range(12))}
    assert undisturbed["index"] == str(list(range(12))).encode()


def _start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", file_direction.__file__, *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(undisturbed, tmp_path):
    out, staging = tmp_path / "out", tmp_path / "out.tmp"
    chance = random.Random(4)
    kept = []
    for number in range(4):
        process = _start(out)
        began = time.monotonic()
        # The last is killed once a file is finished for good, so that there is one to be kept.
        folder, pattern = (staging / ".journal", "*.json") if number == 3 else (staging, "file*")
        least = len(["options.json"]) if number == 3 else len(kept)
        while not len(list(folder.glob(pattern))) > least:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() - began < 120
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.communicate()
        assert not out.exists()
        kept = [path for path in staging.glob("file-*") if not path.name.endswith(".part")]
    # One that got its name, but was killed before the journal knew of it, is rightly made anew.
    finished = [path for path in kept if (staging / ".journal" / f"{path.name}.json").exists()]
    untouched = {path: path.stat().st_mtime_ns for path in finished}
    assert convert(Files(), out, budget=ONE).is_finished
    assert contents(out) == undisturbed
    assert untouched
    for path, modified in untouched.items():
        assert (out / path.name).stat().st_mtime_ns == modified, "written again"


def test_a_finished_file_that_has_changed_is_written_again(undisturbed, tmp_path):
    out, staging = tmp_path / "out", tmp_path / "out.tmp"
    with pytest.raises(ValueError, match="file 5 is cursed"):
        convert(Files(trouble="problem"), out, budget=ONE)
    finished = sorted(path.name for path in staging.glob("file-*"))
    assert finished == [f"file-{number}" for number in (0, 1, 10, 11, 2, 3, 4)]
    (staging / "file-0").write_bytes(b"?" * 10_000)
    (staging / "file-1").unlink()
    assert convert(Files(), out, budget=ONE).is_finished
    assert contents(out) == undisturbed


@pytest.mark.parametrize(
    ("trouble", "error", "message"),
    [
        ("full disk", ValueError, "No space left on device"),
        ("problem", ValueError, "file 5 is cursed"),
        ("killed", ValueError, "file-5: its worker ended with code -9, maybe killed for lack of"),
        ("bug", RuntimeError, "a worker failed at file-5:\nTraceback"),
    ],
)
def test_trouble_is_one_error_and_nothing_looks_finished(tmp_path, trouble, error, message):
    out = tmp_path / "out"
    with pytest.raises(error, match=message):
        convert(Files(trouble=trouble), out, budget=ONE)
    assert not out.exists()
    names = {path.name for path in (tmp_path / "out.tmp").iterdir()}
    assert "file-5" not in names
    assert "index" not in names


@pytest.mark.slow
@pytest.mark.parametrize("num_nodes", [2, 4])
def test_nodes_share_the_files_and_the_last_one_completes(undisturbed, tmp_path, num_nodes):
    processes = [_start(tmp_path / "out", 1, rank, num_nodes) for rank in range(num_nodes)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * num_nodes, errors
    assert contents(tmp_path / "out") == undisturbed


def test_a_node_that_ends_first_leaves_the_end_to_others(undisturbed, tmp_path):
    out = tmp_path / "out"
    assert not convert(Files(), out, budget=ONE, share=Share(1, 2)).is_finished
    assert not out.exists()
    with pytest.raises(ValueError, match="6 of 12 files are not finished, the first is file-"):
        finalize(Files(), out)
    assert convert(Files(), out, budget=ONE, share=Share(0, 2)).is_finished
    assert contents(out) == undisturbed


def test_an_end_that_was_killed_is_only_taken_over_when_asked(undisturbed, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    convert(Files(), out, budget=ONE, share=Share(0, 2))
    convert(Files(), other, budget=ONE, share=Share(1, 2))
    for path in (tmp_path / "other.tmp").rglob("file-*"):
        path.rename(tmp_path / "out.tmp" / path.relative_to(tmp_path / "other.tmp"))
    (tmp_path / "out.tmp" / ".journal" / "ending").touch()
    assert not convert(Files(), out, budget=ONE, share=Share(0, 2)).is_finished
    finalize(Files(), out)
    assert contents(out) == undisturbed


def test_an_end_that_failed_can_be_tried_again(undisturbed, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="no space for the index"):
        convert(Files(trouble="end"), out, budget=ONE)
    assert not out.exists()
    assert convert(Files(), out, budget=ONE).is_finished
    assert contents(out) == undisturbed


def test_killed_between_its_name_and_the_end_it_is_taken_up_again(
    undisturbed, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", _die)
        with pytest.raises(KeyboardInterrupt):
            convert(Files(), out, budget=ONE)
    assert (out / ".journal").is_dir()
    with pytest.raises(ValueError, match=r"out: belongs to another conversion, .* in source"):
        convert(Files(source="b"), out, budget=ONE)
    assert convert(Files(), out, budget=ONE).is_finished
    assert contents(out) == undisturbed


def _die(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_killed_processes_were_writing_does_not_stay(tmp_path):
    journal = Journal(tmp_path / "out", Files().options())
    machine = os.uname().nodename
    mine, others = journal.draft("file-3"), tmp_path / "out.tmp" / "file-3.other.4194305.part"
    dead = mine.with_name(f"file-3.{machine}.4194305.part")
    for path in (mine, others, dead):
        path.touch()
    journal.remove_drafts()
    assert set(mine.parent.glob("*.part")) == {mine, others}, (
        "what runs, here or elsewhere, goes on"
    )


def test_the_seal_gets_size_and_hash_of_every_file_before_the_target_has_its_name(tmp_path):
    out = tmp_path / "out"
    seen = {}

    def seal(folder: Path, entries: Mapping[str, Entry]) -> None:
        assert not out.exists()
        seen.update({name: (entry.size, entry.xxh3) for name, entry in entries.items()})
        (folder / "seal").touch()

    convert(Files(), out, budget=ONE, seal=seal)
    files = {path.name: path.read_bytes() for path in out.glob("file-*")}
    # In file_direction's two parts.
    digest = xxhash.xxh3_128_hexdigest
    assert seen == {
        name: (10_000, digest((digest(content[:5000]) + digest(content[5000:])).encode()))
        for name, content in files.items()
    }
    assert (out / "seal").exists()


@given(
    st.lists(st.integers(0, 10**10), max_size=40),
    st.integers(1, 9),
)
def test_every_file_is_one_nodes(sizes, num_nodes):
    units = [Unit(f"file-{number}", size) for number, size in enumerate(sizes)]
    shares = [Share(rank, num_nodes).of(units) for rank in range(num_nodes)]
    assert sorted(unit.name for share in shares for unit in share) == sorted(u.name for u in units)
    loads = [sum(unit.num_bytes for unit in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_a_target_of_somebody_else_is_refused_and_kept(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").touch()
    with pytest.raises(ValueError, match="exists and is not an empty directory"):
        convert(Files(), out, budget=ONE)
    (tmp_path / "new.tmp").mkdir()
    (tmp_path / "new.tmp" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"new\.tmp: is needed as a temporary name"):
        convert(Files(), tmp_path / "new", budget=ONE)
    assert (out / "thesis.tex").exists()
    assert (tmp_path / "new.tmp" / "thesis.tex").exists()


def test_a_conversion_of_something_else_is_refused_and_kept(tmp_path):
    out = tmp_path / "out"
    convert(Files(), out, budget=ONE, share=Share(0, 2))
    before = contents_of_tree(tmp_path / "out.tmp")
    with pytest.raises(ValueError, match="belongs to another conversion, which differs in source"):
        convert(Files(source="b"), out, budget=ONE)
    assert contents_of_tree(tmp_path / "out.tmp") == before


def contents_of_tree(directory: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_damaged_journal_is_named(tmp_path):
    out = tmp_path / "out"
    convert(Files(), out, budget=ONE, share=Share(0, 2))
    (tmp_path / "out.tmp" / ".journal" / "options.json").write_text("{")
    with pytest.raises(ValueError, match=r"options\.json: damaged"):
        convert(Files(), out, budget=ONE)


def test_too_small_a_disk_is_found_before_the_first_byte(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 100_050_000))
    with pytest.raises(ValueError, match="needs 100,120,000 bytes more, the disk has 100,050,000"):
        convert(Files(), tmp_path / "out", budget=ONE)
    assert list(tmp_path.iterdir()) == []


def test_the_workers_of_a_killed_conversion_end_with_it(tmp_path):
    process = _start(tmp_path / "out", 2)
    while not list(tmp_path.glob("out.tmp/*.part")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [
        pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(workers) == 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: str) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_progress_counts_all_bytes_and_all_memory(tmp_path):
    seen = []
    convert(Files(pause_s=0.01), tmp_path / "out", budget=ONE, on_progress=seen.append)
    assert seen[-1].done_bytes == seen[-1].total_bytes == 120_000
    done = [progress.done_bytes for progress in seen]
    assert done == sorted(done)
    assert seen[-1].memory_bytes > 1.5 * resident_bytes([os.getpid()]) / 2 > 0


def test_a_cap_below_what_workers_need_is_refused():
    with pytest.raises(ValueError, match="max memory of 1,000,000 bytes is too little for 2 work"):
        Budget(1_000_000, 2)
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        Budget(4_000_000_000, 0)
    with pytest.raises(ValueError, match="node rank 2 is not one of 2 nodes"):
        Share(2, 2)


def test_memory_grows_by_what_is_touched():
    before = resident_bytes([os.getpid()])
    # Straight from the system: the heap of this process may have freed pages to give.
    with mmap.mmap(-1, 80_000_000) as block:
        for offset in range(0, len(block), mmap.PAGESIZE):
            block[offset] = 1
        assert 75_000_000 < resident_bytes([os.getpid()]) - before < 90_000_000
    assert resident_bytes([2**22 + 1]) == 0


def test_the_meter_sees_what_a_child_took_and_gave_back():
    code = "block = bytearray(b'x') * 200_000_000; import time; time.sleep(1.5)"
    with PeakMeter() as meter:
        before = resident_bytes([os.getpid()])
        subprocess.run([sys.executable, "-c", code], check=True)
    assert 200_000_000 < meter.peak_bytes - before < 300_000_000
