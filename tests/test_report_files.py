import json
import re
import zlib

import numpy as np
import pytest
from chat_cases import assistant, user
from prepare_cases import GOOD, run, write_rows

from megatron_dsv3.data.report import _Bins
from megatron_dsv3.data.report_files import PICTURES

THOUGHT = [user("q"), assistant("b " * 30, reasoning_content="r " * 10)]


def pixels(path):
    """Share of the picture's bytes that are not those of an empty one: what is drawn."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    packed = b"".join(re.findall(rb"IDAT(.*?)(?=....IDAT|....IEND)", content, re.DOTALL))
    return np.frombuffer(zlib.decompressobj().decompress(packed[:1_000_000]), np.uint8)


def test_a_store_holds_its_report_and_pictures(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", GOOD, GOOD, THOUGHT, [user("q"), assistant("a " * 99)])
    report = run(tmp_path / "store", path, seq_length=64)
    folder = tmp_path / "store" / "report"
    assert {p.name for p in folder.iterdir()} == {"report.json", *(f"{n}.png" for n in PICTURES)}
    written = json.loads((folder / "report.json").read_text())
    assert written["rows"] == {
        "read": 4, "kept": 3, "faulty": 0, "without_sample": 1, "schemas": {"messages": 4}
    }  # fmt: skip
    assert written["tokens"]["kept"] == report.tokens.kept
    assert written["files"][0]["sha256"] == report.files[0].sha256
    for name in PICTURES:
        assert pixels(folder / f"{name}.png").std() > 5, f"{name}: nothing is drawn"


def test_reasoning_and_answer_are_told_apart(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", GOOD, THOUGHT)
    report = run(tmp_path / "store", path)
    [reasoning], [answer] = np.nonzero(report.reasoning_answer.counts)
    edges = report.reasoning_answer.edges
    # "\nr r ... r \n" and "\n\nb b ... b ": one token a letter, and the breaks.
    assert edges[reasoning] <= 12 < edges[reasoning + 1]
    assert edges[answer] <= 32 < edges[answer + 1]


def test_a_truncated_sample_counts_as_long_as_it_is(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [user("q"), assistant("a " * 99)])
    report = run(tmp_path / "store", path, seq_length=64, too_long="truncate")
    assert report.length_quantiles["1"] == report.length_quantiles["0"] == 64
    assert report.tokens.kept == 64


@pytest.mark.parametrize(
    ("value", "where"), [(0, 0), (1, 0), (1.9, 0), (2, 1), (3.9, 1), (4, 2), (1e9, 2)]
)
def test_bins_hold_their_lower_edge_and_the_last_all_above(value, where):
    bins = _Bins(np.array([1.0, 2.0, 4.0]))
    bins.add([value, value])
    assert bins.histogram().counts == tuple(2 * (i == where) for i in range(3))
