"""What can be wrong with an input: each with its message, and what is left when it is skipped."""

import gzip
import io
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstd_file
from chat_cases import TOOL_LOOP, assistant, tool_call, user
from prepare_cases import GOOD, run, samples_of, write_rows

from megatron_dsv3.data import parquet_rows, prepare, report_files


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    """Without what takes most of the time and is tested elsewhere."""
    monkeypatch.setattr(report_files, "PICTURES", {})
    monkeypatch.setattr(parquet_rows, "_MAX_PAGE_BYTES", 1 << 19)
    monkeypatch.setattr(prepare, "tokenizer_fingerprint", lambda _: "")


def row(*turns, **keys):
    return json.dumps({"messages": turns or GOOD, **keys}).encode()


def parquet(*rows):
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


GZ = gzip.compress(b"".join(row(user(str(i)), GOOD[1]) + b"\n" for i in range(300)))
ZST = zstd_file.compress(row(user("q" * 5000), GOOD[1]))
BOMB = zstd_file.compress(row(user("q" * 2000), GOOD[1]) * 100_000)
CALLING = {"tool_calls": [tool_call("f", "{}")], "reasoning_content": "r"}

# name: content of a file, its reason, the message after the file's name, rows that are kept of it
FAULTS = {
    "empty file": (b"", "empty file", ": no rows in it; expected at least one object", 0),
    "blank file": (b" \n\n ", "empty file", ": no rows in it; expected at least one object", 0),
    "empty array": (b"[]", "empty file", ": no rows in it; expected at least one object", 0),
    "spaces": (
        b" " * (1 << 20) + row(),
        "unknown kind of file",
        ": expected a JSON array, JSONL or Parquet, got 1048576 bytes of space at its start",
        0,
    ),
    "plain text": (b"hello", "unknown kind of file", ": expected a JSON array, JSONL or Parq", 0),
    "csv": (b"role,content\nuser,q\n", "unknown kind of file", ": expected a JSON array", 0),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "unknown kind of file", ": expected a JSON arr", 0),
    "array cut off": (
        b"[" + row() + b", " + row()[:30],
        "file cut off",
        f":1:{len(row()) + 34} (byte {len(row()) + 33}): the file ends inside the array, at row 2;",
        1,
    ),
    "array without end": (
        b"[" + row(),
        "file cut off",
        ": the file ends inside the array, at row 1; is it cut off?",
        1,
    ),
    "comma missing": (
        b"[" + row() + b" " + row() + b"]",
        "not JSON",
        f":1:{len(row()) + 3} (byte {len(row()) + 2}): expected ',' or ']' after row 1, got '{{'",
        1,
    ),
    "text after array": (
        b"[" + row() + b"]\nx",
        "not JSON",
        f":2:1 (byte {len(row()) + 3}): text after the array's closing bracket",
        1,
    ),
    "line cut off": (
        row() + b"\n" + row()[:20],
        "not JSON",
        f":2:16 (byte {len(row()) + 16}): Unterminated string starting at; expected one whole",
        1,
    ),
    "two on a line": (
        row() + row() + b"\n" + row(),
        "not JSON",
        f":1:{len(row()) + 1} (byte {len(row())}): Extra data; expected one whole JSON object a",
        1,
    ),
    "pretty-printed": (
        b'{\n"messages": 1}',
        "not JSON",
        ":1:2 (byte 1): Expecting property nam",
        0,
    ),
    "nested": (b'{"a": ' + b"[" * 200_000, "not JSON", ":1 (byte 0): nested too deeply", 0),
    "long number": (
        b"[" + row() + b', {"a": ' + b"1" * 5000 + b"}, " + row() + b"]",
        "not JSON",
        f":2 (byte {len(row()) + 3}): Exceeds the limit (4300 digits) for integer string",
        2,
    ),
    "key twice": (
        b"[" + row() + b', {"messages": [{"role": "user", "content": "a", "content": "b"}]}]',
        "not JSON",
        f":2 (byte {len(row()) + 3}): the key 'content' stands twice in one object",
        1,
    ),
    "not UTF-8": (
        row() + b'\n{"messages": "\xff"}',
        "not UTF-8",
        f":2: byte {len(row()) + 15}: expected UTF-8, got 0xff (invalid start byte)",
        1,
    ),
    "gzip cut off": (
        GZ[: len(GZ) // 2],
        "file cut off",
        ": the compressed data end too early",
        None,
    ),
    "gzip checksum": (
        GZ[:-8] + bytes(8),
        "damaged compression",
        ": the compressed data are dam",
        300,
    ),
    "zstd cut off": (
        ZST[: len(ZST) // 2],
        "file cut off",
        ": the compressed data end too early",
        0,
    ),
    "bomb": (BOMB, "decompression bomb", f" bytes came out of {len(BOMB)}; expected at most", 0),
    "parquet cut off": (
        parquet({"messages": GOOD})[:200],
        "damaged Parquet",
        ": not readable as",
        0,
    ),
    "parquet columns": (
        parquet({"text": "a"}),
        "unknown schema",
        ": expected a column messages or conversations, got text",
        0,
    ),
    "parquet null": (
        parquet({"messages": GOOD}, {"messages": None}),
        "bad conversation",
        ":2: messages: expected a list of turns, got null",
        1,
    ),
    "number": (b"[3, " + row() + b"]", "not an object", ":1 (byte 1): expected an object", 1),
    "list a line": (
        row() + b"\n[1]",
        "not an object",
        "expected an object with messages, got a l",
        1,
    ),
    "no schema": (
        b'{"prompt": "a", "completion": "b"}',
        "unknown schema",
        ":1 (byte 0): expected an object with the key messages or conversations, got prompt, compl",
        0,
    ),
    "odd keys": (
        b'{"\\ud800": 1, "\\u001b[2J": 2}',
        "unknown schema",
        r"the key messages or conversations, got '\ud800', '\x1b[2J'",
        0,
    ),
    "both schemas": (
        row(conversations=[1]),
        "unknown schema",
        "messages and conversations, got",
        0,
    ),
    "tools": (row(tools=[{}]), "bad conversation", "DeepSeek's templates write no tool defini", 0),
    "no turns": (b'{"messages": []}', "bad conversation", "messages: empty conversation", 0),
    "no assistant": (row(user("q")), "bad conversation", "no assistant turn to learn from", 0),
    "unknown role": (row({"role": "bot"}), "bad conversation", "messages[0].role: expected one", 0),
    "no content": (
        row(user("q"), {"role": "assistant"}),
        "bad conversation",
        "[1].content: exp",
        0,
    ),
    "image": (
        row(user([{"type": "image_url"}]), assistant("a")),
        "bad conversation",
        "messages[0].content[0]: expected a part of type 'text', got 'image_url'",
        0,
    ),
    "misspelled key": (
        row(user("q"), assistant("a", reasoning="r")),
        "bad conversation",
        "unknown key 'reasoning' in a turn of assistant; did you mean 'reasoning_content'?",
        0,
    ),
    "open think": (
        row(user("q"), assistant("<think>r")),
        "bad conversation",
        "messages[1].content: <think> has no </think>; is the turn cut off?",
        0,
    ),
    "unbroken": (
        row(user("x"), assistant("ab" * (1 << 19) + "c")) + b"\n" + row(),
        "no text",
        ":1 (byte 0): 1048577 characters without a break ('abab",
        1,
    ),
    "NaN in arguments": (
        row(user("x"), assistant("", tool_calls=[tool_call("f", {"a": float("nan")})])),
        "bad conversation",
        "messages[1].tool_calls[0].function.arguments: expected what JSON can hold",
        0,
    ),
    "parquet pages": (
        parquet({"messages": [user("q"), assistant("a" * 600_000)]}),
        "pages too large",
        ": reading row group 0 takes ",
        0,
    ),
    "array bad byte": (
        b"[" + row() + b', {"messages": "\xff"}]',
        "not UTF-8",
        f": byte {len(row()) + 17}: expected UTF-8, got 0xff (invalid start byte); at row 2",
        1,
    ),
    "surrogate": (
        b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        "bad conversation",
        "messages[0].content: half of a surrogate pair (U+D83D)",
        0,
    ),
    "share_gpt speaker": (
        b'{"conversations": [{"from": "me", "value": "a"}]}',
        "bad conversation",
        "conversations[0].from: expected one of system, human",
        0,
    ),
    "no loss": (
        row(user("q"), assistant("a", loss=False)),
        "nothing to learn",
        ":1 (byte 0): no counted token: loss is false on all 1 assistant turns",
        0,
    ),
    "template": (
        row(*TOOL_LOOP[:6], assistant("", **CALLING)),
        "the template cannot write it",
        "messages[6]: deepseek_r1 has no place for reasoning in a later round of tool calls",
        0,
    ),
}


def test_there_are_enough_of_them():
    assert len(FAULTS) >= 25


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_input_is_an_error_with_its_message_and_leaves_nothing(tmp_path, name):
    content, _, message, _ = FAULTS[name]
    path = tmp_path / "chats"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        run(tmp_path / "store", path)
    assert str(caught.value).startswith(f"{path}:")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["chats"]


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_input_that_is_skipped_is_counted_and_keeps_no_good_row_out(tmp_path, name):
    content, reason, message, num_kept = FAULTS[name]
    path = tmp_path / "chats"
    path.write_bytes(content)
    good = write_rows(tmp_path / "good.jsonl", GOOD, GOOD)
    report = run(tmp_path / "store", path, good, on_bad_row="skip")
    assert set(report.faults.by_reason) == {reason}
    assert message in report.faults.examples[0]
    ids = [sample.id for sample in samples_of(tmp_path / "store")]
    assert ids[-2:] == [f"{good}:1", f"{good}:2"]
    assert report.rows.read == report.rows.kept + report.rows.faulty
    if num_kept is not None:
        assert len(ids) == num_kept + 2
    else:
        assert report.rows.read > 2
        assert report.faults.files_given_up == 1


def test_a_store_of_nothing_is_an_error_with_all_reasons(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [user("q")], [user("q"), assistant("word " * 50)])
    problem = (
        "no sample left of 2 rows at a sequence length of 20 tokens: "
        "1 longer than the sequence length; 1 rows or files: bad conversation"
    )
    with pytest.raises(ValueError, match=problem):
        run(tmp_path / "store", path, seq_length=20, on_bad_row="skip")
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"template": "chatml"}, "template: expected one of deepseek_v3, .* tokenizer .*'chatml'"),
        ({"seq_length": 0}, "seq_length: expected at least 1, got 0"),
        ({"too_long": "cut"}, "too_long: expected one of drop, truncate, error, got 'cut'"),
        ({"history_reasoning": "x"}, "history_reasoning: expected one of strip, keep, expand, got"),
        ({"on_bad_row": "ignore"}, "on_bad_row: expected error or skip, got 'ignore'"),
        ({"num_workers": 0}, "num_workers: expected at least 1, got 0"),
    ],
)
def test_a_wrong_option_is_named(tmp_path, options, problem):
    path = write_rows(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(ValueError, match=problem):
        run(tmp_path / "store", path, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
