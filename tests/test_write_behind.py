"""Files reach the disk on the way, and a disk that fails is not missed."""

import errno
import os

import pytest

from megatron_dsv3.convert import write_behind
from megatron_dsv3.convert.write_behind import WriteBehind


def test_a_file_is_synced_on_the_way_and_at_its_end(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(write_behind, "_SYNC_BYTES", 1000)
    for name in ("fdatasync", "fsync"):
        monkeypatch.setattr(os, name, lambda _, name=name: calls.append(name))
    with (tmp_path / "file").open("wb") as file:
        behind = WriteBehind(file)
        for number, expected in enumerate([0, 0, 1, 1, 1, 2], start=1):
            file.write(bytes(400))
            behind.wrote(400)
            if behind._running is not None:
                behind._running.result()
            assert calls == ["fdatasync"] * expected, number
        behind.finish()
        assert (tmp_path / "file").stat().st_size == 2400
        behind.close()
    assert calls == ["fdatasync", "fdatasync", "fsync"]


def test_a_write_that_did_not_reach_the_disk_is_an_error_later(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write_behind, "_SYNC_BYTES", 1)
    monkeypatch.setattr(os, "fdatasync", fail)
    with (tmp_path / "file").open("wb") as file:
        behind = WriteBehind(file)
        behind.wrote(1)
        with pytest.raises(OSError, match="No space left"):
            behind.finish()
        behind.close()
