import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from store_cases import RECIPE

from megatron_dsv3.data.manifest import read_manifest
from megatron_dsv3.data.store import Store, StoreWriter, mask_of, spans_of

SAMPLES = [
    ("a.jsonl:1", [5, 6, 7, 8, 129279], [[1, 2], [3, 5]]),
    ("a.jsonl:2", [9], [[0, 1]]),
    ("ü.jsonl:1#3", [1, 2, 3], []),
]


def write(directory, samples=SAMPLES, **options):
    with StoreWriter(directory, **options) as writer:
        for sample_id, tokens, spans in samples:
            writer.add(
                sample_id, np.array(tokens, np.int32), np.array(spans, np.int32).reshape(-1, 2)
            )
        writer.finish(RECIPE)
    return directory


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_megatron_cores_own_reader_reads_a_store(tmp_path):
    store = write(tmp_path / "store")
    tokens = IndexedDataset(str(store / "tokens"))
    assert [row.tolist() for row in tokens] == [tokens for _, tokens, _ in SAMPLES]
    assert tokens.index.dtype is np.int32
    assert tokens.document_indices.tolist() == [0, 1, 2, 3]
    spans = IndexedDataset(str(store / "spans"))
    assert [row.tolist() for row in spans] == [[1, 2, 3, 5], [0, 1], []]
    ids = IndexedDataset(str(store / "ids"))
    assert [bytes(row).decode() for row in ids] == [sample_id for sample_id, _, _ in SAMPLES]


def test_a_store_gives_back_what_was_added(tmp_path):
    store = Store(write(tmp_path / "store"))
    assert len(store) == 3
    assert store.lengths.tolist() == [5, 1, 3]
    for i, (sample_id, tokens, spans) in enumerate(SAMPLES):
        assert store.id(i) == sample_id
        assert store.tokens(i).tolist() == tokens
        assert store.tokens(i).dtype == store.spans(i).dtype == np.int32
        assert store.spans(i).tolist() == spans
    first = store.sample(0)
    assert (first.id, first.tokens.tolist()) == ("a.jsonl:1", [5, 6, 7, 8, 129279])
    assert first.loss.tolist() == [False, True, False, True, True]


def test_the_manifest_accounts_for_samples_and_files(tmp_path):
    directory = write(tmp_path / "store")
    manifest = read_manifest(directory)
    assert manifest.recipe == RECIPE
    assert (manifest.num_samples, manifest.num_tokens) == (3, 9)
    assert (manifest.num_counted, manifest.longest) == (4, 5)
    for name, record in manifest.files.items():
        content = (directory / name).read_bytes()
        assert record.size == len(content)
        assert record.sha256 == hashlib.sha256(content).hexdigest()
    assert names(directory) == sorted([*manifest.files, "manifest.json"])


def test_an_index_longer_than_one_write_is_right(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_dsv3.data.store._POINTERS_PER_WRITE", 4)
    samples = [(f"a:{i}", list(range(i + 1)), [[0, 1]]) for i in range(11)]
    store = Store(write(tmp_path / "store", samples))
    assert [store.tokens(i).tolist() for i in range(11)] == [tokens for _, tokens, _ in samples]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(loss=st.lists(st.booleans(), max_size=40))
def test_spans_and_mask_are_inverse(loss):
    spans = spans_of(np.array(loss, np.bool_))
    found = [False] * len(loss)
    for start, end in spans:
        assert start < end
        found[start:end] = [True] * (end - start)
    assert found == loss
    assert mask_of(spans, len(loss)).tolist() == loss
    assert all(end < start for end, start in zip(spans[:-1, 1], spans[1:, 0], strict=True))


@pytest.mark.parametrize(
    "spans", [[[0, 4]], [[-1, 2]], [[2, 2]], [[2, 1]], [[0, 2], [1, 3]], [[0, 1], [1, 2]]]
)
def test_spans_that_are_none_are_refused(tmp_path, spans):
    problem = re.escape(f"a.jsonl:7: loss spans must ascend within 3 tokens, got {spans}")
    with pytest.raises(ValueError, match=problem):
        write(tmp_path / "store", [("a.jsonl:7", [1, 2, 3], spans)])
    assert names(tmp_path) == []


def test_a_store_with_nothing_to_learn_is_refused(tmp_path):
    with pytest.raises(ValueError, match="store: no counted token in 1 samples"):
        write(tmp_path / "store", SAMPLES[2:])
    assert names(tmp_path) == []


def test_a_complete_store_is_replaced_only_on_demand(tmp_path):
    directory = write(tmp_path / "store")
    with pytest.raises(ValueError, match="store: holds a complete store already; name another"):
        write(directory, SAMPLES[:1])
    assert len(Store(directory)) == 3
    write(directory, SAMPLES[:1], replace=True)
    assert len(Store(directory)) == 1
    assert names(tmp_path) == ["store"]


def test_a_store_without_manifest_is_incomplete_and_replaced(tmp_path):
    directory = write(tmp_path / "store")
    (directory / "manifest.json").unlink()
    assert read_manifest(directory) is None
    with pytest.raises(ValueError, match=r"store: the store is incomplete \(no manifest.json\); w"):
        Store(directory)
    assert len(Store(write(directory, SAMPLES[:2]))) == 2


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    samples = [("s:1", [1] * 1000, [[1, 3]])] * 100
    # A file that may not grow fails as one on a full disk does: at a write, and again at its close.
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path / "store", samples)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_other_peoples_files_are_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds thesis.tex, which belong to no store"):
        write(tmp_path, replace=True)
    with pytest.raises(ValueError, match=r"thesis.tex: is a file; expected a directory"):
        write(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "mine"


KILLED = """
import sys, time
from pathlib import Path
import numpy as np
from megatron_dsv3.data.store import StoreWriter
writer = StoreWriter(Path(sys.argv[1]), replace=True)
writer.add("a", np.arange(9, dtype=np.int32), np.array([[0, 2]], np.int32))
print("writing", flush=True)
time.sleep(60)
"""


def test_a_killed_writer_leaves_the_old_store_and_the_next_one_cleans_up(tmp_path):
    directory = write(tmp_path / "store")
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, directory], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "writing\n"
        with pytest.raises(ValueError, match=r"store.unfinished: another process is writing this"):
            StoreWriter(directory, replace=True)
        os.kill(process.pid, signal.SIGKILL)
    assert len(Store(directory)) == 3
    assert names(tmp_path) == ["store", "store.unfinished"]
    assert read_manifest(tmp_path / "store.unfinished") is None
    write(directory, SAMPLES[:1], replace=True)
    assert names(tmp_path) == ["store"]
    assert len(Store(directory)) == 1


def test_no_store_is_said_so(tmp_path):
    with pytest.raises(ValueError, match=r"none: no such directory .*`megatron-dsv3 prepare`"):
        Store(tmp_path / "none")


def change(directory, name, how):
    content = bytearray((directory / name).read_bytes())
    (directory / name).write_bytes(how(content))


def test_a_truncated_file_is_found_at_opening(tmp_path):
    directory = write(tmp_path / "store")
    change(directory, "tokens.bin", lambda content: content[:-4])
    with pytest.raises(ValueError, match=r"gives tokens.bin 36 bytes, but it has 32 bytes; copy"):
        Store(directory)
    (directory / "tokens.bin").unlink()
    with pytest.raises(ValueError, match=r"gives tokens.bin 36 bytes, but it is missing; copy"):
        Store(directory)


def test_a_changed_byte_is_found_by_its_hash(tmp_path):
    directory = write(tmp_path / "store")
    Store(directory).check_hashes()
    change(directory, "tokens.bin", lambda content: content[:-1] + b"\x07")
    with pytest.raises(ValueError, match=r"gives tokens.bin the hash [0-9a-f]{64}, but it has"):
        Store(directory).check_hashes()


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("num_samples", 4, r"gives 4 samples, but tokens.idx has 3; copy the store again"),
        ("files", {}, r"manifest.json lists ; copy the store again"),
        ("format", "store 2", r"not the manifest of a store: format: must be 'megatron-dsv3 store"),
        ("longest", "5", r"not the manifest of a store: longest: must be a valid integer"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, name, value, problem):
    path = write(tmp_path / "store") / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ValueError, match=problem):
        Store(path.parent)
