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
    assert [path.name for path in inputs.ignored] == ["README.md", "e.json.tmp"]


def test_a_pattern_stands_for_what_it_matches_in_order(tmp_path):
    make(tmp_path, "p2.jsonl", "p1.jsonl", "q.jsonl", "d/p3.jsonl", "pdir/x")
    assert found(find_inputs([tmp_path / "p*.jsonl"]), tmp_path) == ["p1.jsonl", "p2.jsonl"]
    assert found(find_inputs([tmp_path / "**/p3.jsonl"]), tmp_path) == ["d/p3.jsonl"]


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
        (["a.jsonl", "."], ValueError, r"a.jsonl: named twice"),
    ],
)
def test_what_stands_for_no_file_is_named(tmp_path, names, error, problem):
    make(tmp_path, "a.jsonl", "empty/README.md")
    with pytest.raises(error, match=problem):
        find_inputs([tmp_path / name for name in names])
