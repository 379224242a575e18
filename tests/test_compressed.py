import gzip
import hashlib
import json

import pytest
import zstd_file

from megatron_dsv3.data import compressed
from megatron_dsv3.data.rows import Fault, decode
from megatron_dsv3.data.sources import Source

PACK = {"gzip": gzip.compress, "zstd": zstd_file.compress}
ROWS = [{"messages": hashlib.sha256(bytes([i % 256])).hexdigest() * (i % 9)} for i in range(3000)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def read(path, content):
    """Values and faults of a file with that content, and the source."""
    path.write_bytes(content)
    source = Source(path)
    rows = [row for item in source.items() for row in decode(item)]
    faults = [row for row in rows if isinstance(row, Fault)]
    return [row.value for row in rows if not isinstance(row, Fault)], faults, source


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("text", [LINES, json.dumps(ROWS).encode()], ids=["jsonl", "json"])
def test_compressed_files_read_as_their_text(tmp_path, packing, text):
    content = PACK[packing](text)
    values, faults, source = read(tmp_path / "no-suffix-needed", content)
    assert (values, faults) == (ROWS, [])
    assert source.kind == f"{'jsonl' if text == LINES else 'json'}+{packing}"
    assert source.sha256 == hashlib.sha256(content).hexdigest()
    assert source.num_read == len(content)


@pytest.mark.parametrize("packing", PACK)
def test_parts_written_one_after_the_other_are_one_text(tmp_path, packing):
    values, faults, _ = read(tmp_path / "a", PACK[packing](LINES) + PACK[packing](LINES))
    assert (values, faults) == (ROWS * 2, [])


def test_a_file_of_pzstd_begins_with_a_frame_to_be_skipped(tmp_path):
    frame = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"size"
    values, faults, _ = read(tmp_path / "a", frame + PACK["zstd"](LINES))
    assert (values, faults) == (ROWS, [])


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("text", [LINES, json.dumps(ROWS).encode()], ids=["jsonl", "json"])
def test_whole_rows_before_a_cut_are_given(tmp_path, packing, text):
    content = PACK[packing](text)
    values, faults, source = read(tmp_path / "a", content[: len(content) * 2 // 3])
    assert 0 < len(values) < len(ROWS)
    assert values == ROWS[: len(values)]
    [fault] = faults
    assert (fault.reason, fault.ends_file) == ("file cut off", True)
    assert "a: the compressed data end too early (after " in fault.message
    assert source.sha256 == hashlib.sha256(content[: len(content) * 2 // 3]).hexdigest()


@pytest.mark.parametrize(
    ("packing", "content"),
    [
        ("gzip", gzip.compress(LINES)[:-8] + bytes(8)),
        ("gzip", gzip.compress(LINES) + b"junk"),
        ("zstd", zstd_file.compress(LINES)[:12] + b"\xff" * 50 + zstd_file.compress(LINES)[62:]),
    ],
    ids=["checksum", "tail", "content"],
)
def test_damage_is_found(tmp_path, packing, content):
    _, faults, _ = read(tmp_path / "a", content)
    assert [fault.reason for fault in faults] == ["damaged compression"]
    assert "a: the compressed data are damaged (after " in faults[0].message


@pytest.mark.parametrize("packing", PACK)
def test_a_bomb_is_refused_before_it_fills_memory(tmp_path, monkeypatch, packing):
    monkeypatch.setattr(compressed, "FREE_BYTES", 1 << 20)
    asked = []
    check = compressed._Bounded._check

    def watched(stream):
        asked.append(stream.num_bytes)
        check(stream)

    monkeypatch.setattr(compressed._Bounded, "_check", watched)
    bomb = (json.dumps({"messages": "0" * 1000}) + "\n").encode() * 60_000
    values, faults, _ = read(tmp_path / "a", PACK[packing](bomb))
    assert len(values) < 60_000
    assert [fault.reason for fault in faults] == ["decompression bomb"]
    assert "expected at most 250 times as many" in faults[0].message
    assert max(asked) < len(bomb) * 0.6


def test_a_file_may_not_unpack_to_more_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "MAX_BYTES", len(LINES) - 1)
    _, faults, _ = read(tmp_path / "a", gzip.compress(LINES))
    assert [fault.reason for fault in faults] == ["decompression bomb"]
    assert f"{len(LINES) - 1} in all" in faults[0].message


def test_a_short_repetition_is_no_bomb(tmp_path):
    lines = b'{"messages": 1}\n' * 100_000
    values, faults, _ = read(tmp_path / "a", zstd_file.compress(lines))
    assert len(lines) / len(zstd_file.compress(lines)) > compressed.MAX_RATIO
    assert (len(values), faults) == (100_000, [])
