"""Files written past the page cache: every byte where it belongs, hashed, and no error missed."""

import errno
import os
import random

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dsv3.convert import direct_file
from megatron_dsv3.convert.direct_file import DirectFile, Part, combined

BUFFER = 8192


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch) -> None:
    monkeypatch.setattr(direct_file, "_BUFFER_BYTES", BUFFER)


@pytest.fixture(params=["direct", "no direct writes", "direct writes refused"])
def kind(request, monkeypatch) -> str:
    """What the file system knows."""
    real = os.pwrite
    if request.param == "no direct writes":
        monkeypatch.setattr(direct_file, "_open_direct", lambda path: None)
    elif request.param == "direct writes refused":
        # A second descriptor is that of direct writes.
        opened = []
        monkeypatch.setattr(
            direct_file, "_open_direct", lambda path: opened.append(os.open(path, 1)) or opened[0]
        )

        def pwrite(descriptor, content, position):
            if descriptor in opened:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(descriptor, content, position)

        monkeypatch.setattr(os, "pwrite", pwrite)
    return request.param


def write(path, pieces, size=None) -> list[Part]:
    """`pieces`: position and content of each."""
    file = DirectFile(path, size)
    try:
        for position, content in pieces:
            file.write(content, position)
        return file.finish()
    finally:
        file.close()


def check(path, parts, content) -> None:
    assert path.read_bytes() == content
    assert sum(part.num_bytes for part in parts) == len(content)
    start = 0
    for part in parts:
        piece = content[start : start + part.num_bytes]
        assert part.xxh3 == xxhash.xxh3_128_hexdigest(piece)
        start += part.num_bytes


def in_pieces(content, start, stop, step):
    return [(at, content[at : min(at + step, stop)]) for at in range(start, stop, step)]


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 8192, 100_000])
@pytest.mark.parametrize("step", [1000, 4096, 30_000])
def test_one_run_has_the_hash_of_the_file(kind, tmp_path, size, step):
    content = random.Random(size).randbytes(size)
    parts = write(tmp_path / "file", in_pieces(content, 0, size, step))
    check(tmp_path / "file", parts, content)
    assert len(parts) == 1
    assert combined(parts) == xxhash.xxh3_128_hexdigest(content)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=9), st.integers(0, 99), st.booleans())
def test_runs_that_take_turns_and_share_blocks_do_not_disturb_each_other(
    tmp_path_factory, sizes, seed, known
):
    chance = random.Random(seed)
    content = chance.randbytes(sum(sizes))
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    queues = [
        in_pieces(content, start, start + size, chance.randint(500, 9000))
        for start, size in zip(starts, sizes, strict=True)
    ]
    pieces = []
    while waiting := [queue for queue in queues if queue]:
        pieces.append(chance.choice(waiting).pop(0))
    path = tmp_path_factory.mktemp("runs") / "file"
    check(path, write(path, pieces, len(content) if known else None), content)


def test_memory_does_not_grow_with_the_number_of_runs(tmp_path):
    file = DirectFile(tmp_path / "file")
    for position in range(0, 400_000, 4000):
        file.write(b"x" * 10, position)
    assert file._num_buffers <= direct_file._MAX_BUFFERS
    assert len(file._runs) <= direct_file._MAX_RUNS
    file.finish()
    file.close()


def test_an_older_file_is_emptied(kind, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"o" * 50_000)
    check(path, write(path, [(0, b"new")]), b"new")


@pytest.mark.parametrize("size", [10, 100_000])
def test_bytes_that_did_not_reach_the_disk_are_an_error(tmp_path, monkeypatch, size):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", [(0, b"x" * size)])


def test_a_disk_that_fails_at_the_end_is_an_error(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "file", [(0, b"x")])


def test_without_direct_writes_the_cache_is_synced_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(direct_file, "_open_direct", lambda path: None)
    monkeypatch.setattr(direct_file, "_SYNC_BYTES", 3 * BUFFER)
    synced = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    write(tmp_path / "file", in_pieces(b"x" * 10 * BUFFER, 0, 10 * BUFFER, 5000))
    assert len(synced) == 3


def test_whole_blocks_go_past_the_cache_where_that_is_known(tmp_path, monkeypatch):
    file = DirectFile(tmp_path / "file")
    if file._direct is None:
        file.close()
        pytest.skip("this file system knows no direct writes")
    real, direct = os.pwrite, []

    def pwrite(descriptor, content, position):
        if descriptor == file._direct:
            direct.append((position, len(content)))
        return real(descriptor, content, position)

    monkeypatch.setattr(os, "pwrite", pwrite)
    file.write(b"x" * 30_000, 5000)
    file.finish()
    file.close()
    # From the first whole block to the last; the buffer ends at a block, too.
    assert direct == [(8192, 4096), (12_288, 8192), (20_480, 8192), (28_672, 4096)]
