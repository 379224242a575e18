import json
import os
import pickle
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_dsv3.data import json_rows
from megatron_dsv3.data.rows import Fault, decode
from megatron_dsv3.data.sources import Source

property_test = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
messages_values = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 10**20) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def read_rows(path):
    """The rows of one file, in order; the first fault is an error."""
    for item in Source(path).items():
        for row in decode(item):
            if isinstance(row, Fault):
                raise ValueError(row.message)
            yield row


def write(tmp_path, text, name="chat.json"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_an_array_and_lines_give_the_same_rows(tmp_path):
    rows = [{"messages": [1], "id": 7}, {"messages": "\u00e9\u2028"}, {"messages": []}]
    array = write(tmp_path, json.dumps(rows, indent=1))
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    lines = write(tmp_path, lines, "chat.jsonl")
    for path in (array, lines):
        assert [(row.source, row.value) for row in read_rows(path)] == [
            (f"{path}:{i}", row) for i, row in enumerate(rows, start=1)
        ]


def test_rows_know_their_byte(tmp_path):
    rows = ['{"messages": "\u00e9"}', '{"messages": 2}', '{"a": 3}']
    array = write(tmp_path, f"[{rows[0]},\n {rows[1]}, {rows[2]}]")
    lines = write(tmp_path, "\n".join(rows), "chat.jsonl")
    for path in (array, lines):
        content = path.read_bytes()
        for row, text in zip(read_rows(path), rows, strict=True):
            assert content[row.byte :].startswith(text.encode())
            assert row.place == f"{path}:{row.number} (byte {row.byte})"


def test_rows_of_lines_are_line_numbers_and_blank_lines_are_skipped(tmp_path):
    path = write(tmp_path, '\n{"messages": 1}\r\n  \n{"messages": 2}')
    assert [(row.number, row.value["messages"]) for row in read_rows(path)] == [(2, 1), (4, 2)]


@pytest.mark.parametrize("text", ['[{"messages": 1}]', '{"messages": 1}\n'])
def test_a_byte_order_mark_is_skipped(tmp_path, text):
    assert [
        row.value["messages"] for row in read_rows(write(tmp_path, b"\xef\xbb\xbf" + text.encode()))
    ] == [1]


@property_test
@given(
    values=st.lists(messages_values, min_size=1, max_size=4),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 2]),
    escaped=st.booleans(),
)
def test_an_array_reads_the_same_in_chunks_of_any_size(
    tmp_path, monkeypatch, values, chunk, indent, escaped
):
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", chunk)
    rows = [{"messages": value} for value in values]
    text = json.dumps(rows, indent=indent, ensure_ascii=escaped)
    path = write(tmp_path, text.encode("utf-8", "replace"))
    assert [row.value["messages"] for row in read_rows(path)] == [
        row["messages"] for row in json.loads(path.read_text(encoding="utf-8"))
    ]


@property_test
@given(cut=st.integers(1, 70), chunk=st.integers(1, 40))
def test_a_truncated_array_is_an_error_at_the_files_end(tmp_path, monkeypatch, cut, chunk):
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", chunk)
    whole = '[{"messages": ["\u00e9", true, null]},\n {"messages": [{"x": "y"}]}]'.encode()
    part = whole[: min(cut, len(whole) - 1)]
    path = write(tmp_path, part)
    if part[-1] == 0xC3:
        problem = rf"byte {len(part) - 1}: the file ends inside a character; is it cut off"
    else:
        problem = rf"\(byte {len(part)}\): the file ends inside the array, at row \d; is it cut"
    with pytest.raises(ValueError, match=problem):
        list(read_rows(path))


def test_the_rows_before_a_truncation_are_given_first(tmp_path):
    rows = read_rows(write(tmp_path, '[{"messages": 1}, {"mess'))
    assert next(rows).value == {"messages": 1}
    with pytest.raises(ValueError, match=r":1:25 \(byte 24\): .* at row 2"):
        next(rows)


@pytest.mark.parametrize("bad", [b"\xff", b"\xc3("])
def test_the_rows_before_a_byte_that_is_not_utf8_are_given_first(tmp_path, bad):
    rows = read_rows(write(tmp_path, b'[{"messages": 1}, {"messages": 2}, {"x": "' + bad + b'"}]'))
    assert [next(rows).value["messages"] for _ in range(2)] == [1, 2]
    with pytest.raises(ValueError, match=r"byte 42: expected UTF-8, got 0x.*; at row 3"):
        next(rows)


def test_half_a_character_behind_the_array_is_an_error(tmp_path):
    rows = read_rows(write(tmp_path, b'[{"messages": 1}]\xc3'))
    assert next(rows).value == {"messages": 1}
    with pytest.raises(ValueError, match="byte 17: the file ends inside a character"):
        next(rows)


def test_a_deeply_nested_element_can_be_sent_to_a_worker(tmp_path):
    """Python decodes deeper nesting than it pickles."""
    value = {"messages": [], "x": json.loads("[" * 700 + "]" * 700)}
    path = write(tmp_path, json.dumps([value, {"messages": 1}]))
    [first, second] = pickle.loads(pickle.dumps(list(Source(path).items())))
    assert next(decode(first)).value == value
    assert next(decode(second)).value == {"messages": 1}


def test_an_array_is_never_held_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", 64)
    row = json.dumps({"messages": "x" * 40})
    path = write(tmp_path, f"[{','.join([row] * 500)}]")
    lengths = []
    read = json_rows._Cursor.read

    def watched(cursor, num_bytes):
        read(cursor, num_bytes)
        lengths.append(len(cursor.text))

    monkeypatch.setattr(json_rows._Cursor, "read", watched)
    assert len(list(read_rows(path))) == 500
    assert max(lengths) <= 2 * 64


@pytest.mark.parametrize("opening", ["[", ""])
def test_a_row_without_an_end_stops_at_the_limit(tmp_path, monkeypatch, opening):
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", 100)
    path = write(tmp_path, opening + '{"messages": "' + "x" * 5000)
    with pytest.raises(ValueError, match=r"chat.json:1.* 1000 bytes"):
        list(read_rows(path))


@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            '[{"messages": 1},\n {"messages": 1 "x": 2}, {"messages": "' + "x" * 60 + '"}]',
            ":2:17 (byte 34): Expecting ',' delimiter; at row 2",
        ),
        (
            '[{"messages": "\u00e9"},\n\n{"messages": \u00e9}, {"messages": "' + "x" * 60 + '"}]',
            ":3:14 (byte 35): Expecting value; at row 2",
        ),
        ('[{"messages": 1} {"messages": 2}]', ":1:18 (byte 17): expected ',' or ']' after row 1"),
        ('[{"messages": 1},]', ":1:18 (byte 17): Expecting value"),
        ('[{"messages": 1}] x', ":1:19 (byte 18): text after the array's closing bracket"),
        ('[{"messages": tru }]', ":1:15 (byte 14): Expecting value"),
        ("[" * 200_000, ":1:2 (byte 1): nested too deeply; at row 1"),
        ("[]", ": no rows in it; expected at least one object with messages"),
        ("", ": no rows in it; expected at least one object with messages"),
        (" \n\n", ": no rows in it; expected at least one object with messages"),
        ("hello", ": expected a JSON array, JSONL or Parquet, got b'h' at its start"),
        (
            '{"messages": 1}\n{"messages": "\u00e9", }\n',
            ":2:19 (byte 35): ",
        ),
        (
            '{"messages": 1}\n{"messages": [1, 2',
            ":2:19 (byte 34): Expecting ',' delimiter; expected ",
        ),
        ('{\n"messages": 1}', ":1:2 (byte 1): Expecting property name enclosed in double quotes"),
        ('{"messages": 1} {"messages": 2}', ":1:17 (byte 16): Extra data; expected one whole JSON"),
        ('{"messages": 1}\n{"a": ' + "[" * 200_000, ":2 (byte 16): nested too deeply"),
        (b'{"messages": 1}\n{"messages": "\xff"}', ":2: byte 30: expected UTF-8, got 0xff"),
        (
            b'[{"messages": 1},\n{"messages": "\xff"}]',
            ": byte 32: expected UTF-8, got 0xff (invalid start byte); at row 2",
        ),
    ],
)
def test_a_bad_file_is_named_with_the_place(tmp_path, monkeypatch, text, problem, chunk):
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", chunk)
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(f"{path}{problem}")) as caught:
        list(read_rows(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/none.json: no such file"):
        next(read_rows(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=rf"{tmp_path}: expected a file of rows, got a directory"):
        next(read_rows(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=rf"{tmp_path}/pipe: expected .* got a pipe or a device"):
        next(read_rows(tmp_path / "pipe"))
