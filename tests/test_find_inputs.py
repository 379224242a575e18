import pytest

from megatron_dsv3.data.sources import find_inputs


def make(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def found(inputs, root):
    return [str(path.relative_to(root)) for path in inputs.files]


def test_a_directory_stands_for_all_data_files_under_it(tmp_path):
    data = ("b.jsonl", "a/x.json.gz", "a/y.parquet", "c.JSONL.zst", "d.ndjson")
    make(tmp_path, *data, "README.md", ".hidden.json", ".git/a.json", "_SUCCESS", "e.json.tmp")
    inputs = find_inputs([tmp_path])
    assert found(inputs, tmp_path) == sorted(data)
    # Hidden files are none, but one that looks like data is named.
    ignored = [".git/a.json", ".hidden.json", "README.md", "e.json.tmp"]
    assert [str(path.relative_to(tmp_path)) for path in inputs.ignored] == ignored


def test_links_are_followed_once(tmp_path):
    make(tmp_path, "data/a.jsonl", "disk/b.jsonl")
    (tmp_path / "data" / "part").symlink_to(tmp_path / "disk")
    (tmp_path / "data" / "part2").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "loop").symlink_to(tmp_path / "data")
    inputs = find_inputs([tmp_path / "data"])
    assert found(inputs, tmp_path / "data") == ["a.jsonl", "part/b.jsonl"]


def test_stores_are_no_input_however_unfinished(tmp_path):
    make(tmp_path, "a.jsonl", *(f"{name}/x.json" for name in ("store", "store.unfinished")))
    for name in ("store", "store.unfinished"):
        make(tmp_path / name, "tokens.bin", "spans.bin", "ids.bin", "report/report.json")
    for given in ([tmp_path], [tmp_path / "*"]):
        inputs = find_inputs(given)
        assert found(inputs, tmp_path) == ["a.jsonl"]
        assert [path.name for path in inputs.ignored] == ["store", "store.unfinished"]


def test_a_pattern_stands_for_what_it_matches_in_order(tmp_path):
    make(tmp_path, "p2.jsonl", "p1.jsonl", "q.jsonl", "d/p3.jsonl", "pdir/x")
    assert found(find_inputs([tmp_path / "p*.jsonl"]), tmp_path) == ["p1.jsonl", "p2.jsonl"]
    assert found(find_inputs([tmp_path / "**/p3.jsonl"]), tmp_path) == ["d/p3.jsonl"]


def test_a_directory_that_a_pattern_matches_is_searched(tmp_path):
    make(tmp_path, "p1/a.jsonl", "p1/README.md", "p2/sub/b.json", "p3.json", "q/c.jsonl")
    inputs = find_inputs([tmp_path / "p*"])
    assert found(inputs, tmp_path) == ["p1/a.jsonl", "p2/sub/b.json", "p3.json"]
    assert [path.name for path in inputs.ignored] == ["README.md"]
    assert found(find_inputs([tmp_path / "p2/**"]), tmp_path) == ["p2/sub/b.json"]


def test_a_pattern_that_goes_round_in_links_takes_each_file_once(tmp_path):
    make(tmp_path, "in/a.jsonl", "in/sub/b.jsonl", "in/sub/README.md")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")
    for pattern in ("in/**/*.jsonl", "in/**/*l"):
        assert found(find_inputs([tmp_path / pattern]), tmp_path) == [
            "in/a.jsonl",
            "in/sub/b.jsonl",
        ]
    everything = find_inputs([tmp_path / "in/**"])
    assert found(everything, tmp_path) == ["in/a.jsonl", "in/sub/README.md", "in/sub/b.jsonl"]


def test_a_file_is_taken_whatever_its_name_even_with_signs_of_a_pattern(tmp_path):
    make(tmp_path, "a[1].txt", "a1.txt")
    paths = [tmp_path / "a[1].txt", tmp_path / "a1.txt"]
    assert found(find_inputs(paths), tmp_path) == ["a[1].txt", "a1.txt"]


@pytest.mark.parametrize(
    ("names", "error", "problem"),
    [
        (["none.jsonl"], FileNotFoundError, "none.jsonl: no such file"),
        (["z*.jsonl"], FileNotFoundError, r"z\*.jsonl: no file matches this pattern"),
        (["empty"], ValueError, r"empty: no data files in it; expected names ending in \.json, "),
        (["a.jsonl", "./a.jsonl"], ValueError, r"a.jsonl: named twice \(the other time as "),
        (["one/a.jsonl", "one"], ValueError, r"a.jsonl: named twice"),
        (["links"], FileNotFoundError, r"links/gone.jsonl: no file, or a link to nothing"),
        (["b\udcff.jsonl"], ValueError, r"b\\udcff.jsonl': the name is not UTF-8; rename it"),
    ],
)
def test_what_stands_for_no_file_is_named(tmp_path, names, error, problem):
    make(tmp_path, "a.jsonl", "empty/README.md", "links/b.jsonl", "b\udcff.jsonl", "one/a.jsonl")
    (tmp_path / "links" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(error, match=problem):
        find_inputs([tmp_path / name for name in names])
