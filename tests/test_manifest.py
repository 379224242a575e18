"""Manifests and folders of checkpoints, made of a few bytes: what is found, kept and dropped."""

import hashlib

import pytest
import xxhash

from megatron_dsv3.checkpoint import directory as folders
from megatron_dsv3.checkpoint.directory import (
    LATEST,
    checkpoints,
    clean,
    commit,
    find_newest,
    incomplete_name,
    name_of,
)
from megatron_dsv3.checkpoint.manifest import (
    MANIFEST,
    read_manifest,
    record_file,
    write_manifest,
    write_part,
    wrong_hashes,
    wrong_sizes,
)


def _incomplete(folder, step):
    path = folder / incomplete_name(step)
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"zero" * step)
    (path / "__1_0.distcp").write_bytes(b"one" * step)
    write_part(path, ["__0_0.distcp"], 0)
    write_part(path, ["__1_0.distcp"], 1)
    (path / "metadata.json").write_text("{}")
    write_manifest(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three whole checkpoints."""
    for step in (1, 2, 3):
        commit(_incomplete(tmp_path, step), step)
    return tmp_path


def test_a_record_is_size_and_hash_of_the_whole_file(tmp_path):
    content = hashlib.shake_128(b"x").digest(9_000_000)  # more than two chunks
    (tmp_path / "f").write_bytes(content)
    record = record_file(tmp_path / "f")
    assert (record.size, record.xxh3_128) == (9_000_000, xxhash.xxh3_128_hexdigest(content))


def test_a_manifest_names_every_file_but_itself(folder):
    path = folder / name_of(2)
    expected = {"__0_0.distcp", "__1_0.distcp", "metadata.json"}
    assert set(read_manifest(path)) == expected
    assert {file.name for file in path.iterdir()} == {*expected, MANIFEST}


def test_a_file_whose_writer_did_not_finish_is_not_taken_in(tmp_path):
    (tmp_path / "__0_0.distcp").write_bytes(b"whole")
    write_part(tmp_path, ["__0_0.distcp"], 0)
    (tmp_path / "__1_0.distcp").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"writer of __1_0\.distcp did not finish"):
        write_manifest(tmp_path)
    assert not (tmp_path / MANIFEST).exists()


NO_FILE_RECORD = '{"format": "megatron-dsv3 checkpoint 1", "files": {"a": {}}}'


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": "other", "files": {}}', NO_FILE_RECORD]
)
def test_what_is_no_manifest_is_said_to_be_none(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match="not the manifest of a checkpoint"):
        read_manifest(tmp_path)


def test_a_flipped_byte_a_short_and_a_missing_file_are_named(folder):
    path = folder / name_of(3)
    files = read_manifest(path)
    (path / "__0_0.distcp").write_bytes(b"zerozerozerO")
    assert not list(wrong_sizes(path, files))
    [problem] = wrong_hashes(path, files)
    assert problem.startswith("__0_0.distcp is damaged: hash ")
    (path / "__1_0.distcp").write_bytes(b"one")
    (path / "metadata.json").unlink()
    assert list(wrong_sizes(path, files)) == [
        "__1_0.distcp has 3 bytes, expected 9",
        "metadata.json cannot be found: No such file or directory",
    ]


def test_the_newest_whole_one_is_found_and_the_others_reasons_told(folder):
    (folder / name_of(3) / MANIFEST).unlink()
    half = folder / incomplete_name(4)
    half.mkdir()
    found = find_newest(folder)
    assert found.path == folder / name_of(2)
    assert found.ignored[0] == f"{half.name}: the save did not finish"
    assert "iter_0000003" in found.ignored[1]
    assert "no such file, so the checkpoint was not finished" in found.ignored[1]
    assert find_newest(folder, {"iter_0000002": "damaged"}).path == folder / name_of(1)


def test_nothing_is_found_where_nothing_is(tmp_path):
    assert find_newest(tmp_path / "none") == folders.Found(None, ())


def test_latest_moves_after_the_name(folder, monkeypatch):
    assert (folder / LATEST).read_text() == "3\n"
    monkeypatch.setattr(folders, "write_durably", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        commit(_incomplete(folder, 4), 4)
    assert find_newest(folder).path == folder / name_of(4)
    assert (folder / LATEST).read_text() == "3\n"


def test_retention_keeps_the_last_and_counts_only_whole_ones(folder):
    (folder / name_of(3) / MANIFEST).unlink()
    assert folders.retain(folder, keep_last=1, keep_weights_every=None) == ["iter_0000001: dropped"]
    assert [path.name for path in checkpoints(folder)] == ["iter_0000002", "iter_0000003"]


def test_the_last_whole_one_is_never_dropped(folder):
    for step in (2, 3):
        (folder / name_of(step) / MANIFEST).unlink()
    assert folders.retain(folder, keep_last=1, keep_weights_every=None) == []
    assert find_newest(folder).path == folder / name_of(1)


def test_an_ignored_checkpoint_gives_way_to_a_new_one_of_its_step(folder):
    (folder / name_of(3) / MANIFEST).unlink()
    commit(_incomplete(folder, 3), 3)
    assert find_newest(folder).path == folder / name_of(3)
    assert len(list(folder.glob("iter_*"))) == 3


def test_cleaning_removes_what_was_left_and_nothing_else(folder):
    (folder / incomplete_name(4)).mkdir()
    (folder / "iter_0000001.dropped-ab").mkdir()
    (folder / "notes.txt").write_text("mine")
    assert len(clean(folder)) == 2
    assert len(checkpoints(folder)) == 3
    assert (folder / "notes.txt").exists()


def test_two_saves_of_a_step_have_names_of_their_own():
    assert incomplete_name(7) != incomplete_name(7)
