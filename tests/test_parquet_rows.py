import hashlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dsv3.data import compressed, parquet_rows
from megatron_dsv3.data.messages import parse_conversation
from megatron_dsv3.data.rows import Fault, decode
from megatron_dsv3.data.schemas import read_chat
from megatron_dsv3.data.sources import Source

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"q{i}", "tool_calls": None},
            {"role": "assistant", "content": "a" * i, "tool_calls": None},
        ],
        "id": i,
    }
    for i in range(50)
]


def write(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def read(path):
    source = Source(path)
    rows = [row for item in source.items() for row in decode(item)]
    return [r for r in rows if not isinstance(r, Fault)], [r for r in rows if isinstance(r, Fault)]


@pytest.mark.parametrize("group", [7, 1000])
def test_rows_come_in_order_without_the_columns_that_mean_nothing(tmp_path, group):
    path = write(tmp_path / "any.name", ROWS, row_group_size=group)
    rows, faults = read(path)
    assert faults == []
    turns = [[{k: t[k] for k in ("role", "content")} for t in row["messages"]] for row in ROWS]
    assert [row.value for row in rows] == [{"messages": messages} for messages in turns]
    assert [row.place for row in rows[:2]] == [f"{path}:1", f"{path}:2"]
    assert read_chat(rows[3].value).conversation[1].content == "aaa"


def test_nested_columns_give_what_was_put_in_and_not_the_keys_of_other_rows(tmp_path):
    """A table makes one type of all arguments, and fills each with null for all others' keys."""
    arguments = ({"city": "Rome"}, {"query": "q", "filter": {"year": 3}}, {"filter": {"tags": []}})
    chats = [
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": one}}]},
        ]
        for one in arguments
    ]
    rows, faults = read(write(tmp_path / "a.parquet", [{"messages": chat} for chat in chats]))
    assert faults == []
    for row, chat in zip(rows, chats, strict=True):
        assert read_chat(row.value).conversation == parse_conversation(chat)
        assert read_chat(row.value).conversation[0].content == "a\nb"


def test_progress_and_hash_are_those_of_the_file(tmp_path):
    path = write(tmp_path / "a.parquet", ROWS)
    source = Source(path)
    seen = [source.num_read for _ in source.items()]
    assert seen == sorted(seen)
    assert 0 < seen[0] < seen[-1] == path.stat().st_size
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_that_is_cut_off_or_damaged_is_named(tmp_path):
    content = write(tmp_path / "a.parquet", ROWS).read_bytes()
    for broken in (content[: len(content) // 2], content[:100] + bytes(60) + content[160:]):
        path = tmp_path / "broken"
        path.write_bytes(broken)
        _, [fault] = read(path)
        assert (fault.reason, fault.ends_file) == ("damaged Parquet", True)
        assert fault.message.startswith(f"{path}: not readable as Parquet: ")
        assert "\n" not in fault.message


def test_a_table_without_conversations_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", [{"text": "a", "id": 1}])
    _, [fault] = read(path)
    problem = f"{path}: expected a column messages or conversations, got text, id"
    assert (fault.reason, fault.message) == ("unknown schema", problem)


def test_a_column_that_stands_twice_is_an_error(tmp_path):
    """Of rows read as objects, the last would be left."""
    column = pa.array([ROWS[0]["messages"]])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([column, column], names=["messages", "messages"]), path)
    _, [fault] = read(path)
    assert fault.reason == "unknown schema"
    assert fault.message.endswith(
        "a column stands twice; expected each once, got messages, messages"
    )


def test_a_string_that_is_no_text_is_a_fault_of_its_row(tmp_path):
    """Arrow takes any bytes for a string, Python does not."""
    texts = pa.array([b"a", b"\xff", b"b"]).view(pa.string())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": texts}), path)
    rows, [fault] = read(path)
    assert [(row.number, row.value) for row in rows] == [
        (1, {"messages": "a"}),
        (3, {"messages": "b"}),
    ]
    assert fault.ends_file is False
    assert fault.message.startswith(f"{path}:2: expected text and numbers, got 'utf-8' codec can't")


def test_a_bomb_by_its_footer_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "FREE_BYTES", 1 << 16)
    rows = [{"messages": str(i) + "0" * 100_000} for i in range(20)]
    path = write(tmp_path / "a.parquet", rows, compression="zstd", use_dictionary=False)
    monkeypatch.setattr(parquet_rows, "_read", None)
    _, [fault] = read(path)
    assert fault.reason == "decompression bomb"
    assert f"{path}: at least 20" in fault.message


def test_a_bomb_by_a_dictionary_is_refused_where_it_unfolds(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "FREE_BYTES", 1 << 20)
    path = write(tmp_path / "a.parquet", [{"messages": "0" * 10_000}] * 2000)
    size = path.stat().st_size
    metadata = pq.read_metadata(path)
    assert metadata.row_group(0).column(0).total_uncompressed_size < 1 << 16, "footer looks fine"
    rows, [fault] = read(path)
    assert fault.reason == "decompression bomb"
    assert len(rows) * 10_000 <= max(compressed.FREE_BYTES, 250 * size) < 2000 * 10_000


def test_a_row_longer_than_a_row_may_be_is_a_fault_and_the_others_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_rows, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(parquet_rows, "_TABLE_BYTES", 2000)
    lengths = (1, 100_000, 2, 3, 900)
    path = write(tmp_path / "a.parquet", [{"messages": "0" * n} for n in lengths])
    rows, [fault] = read(path)
    assert [(row.number, len(row.value["messages"])) for row in rows] == [
        (1, 1),
        (3, 2),
        (4, 3),
        (5, 900),
    ]
    assert (fault.reason, fault.ends_file) == ("longer than a row may be", False)
    assert fault.message.startswith(f"{path}:2: a row of 1000")
    assert fault.message.endswith("; expected at most 1000")


def test_long_rows_go_to_workers_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_rows, "_TABLE_BYTES", 1000)
    rows = [{"messages": "0" * (400 if i % 8 < 4 else 10)} for i in range(80)]
    path = write(tmp_path / "a.parquet", rows)
    items = list(Source(path).items())
    assert [item.number for item in items[:6]] == [1, 2, 3, 4, 5, 9]
    assert len(items) == 40 + 10
    assert [row.value for row in read(path)[0]] == rows


def test_pages_too_large_for_memory_are_refused_unread(tmp_path, monkeypatch):
    """A page is unpacked whole; what the footer says of all pages together is no measure of it."""
    monkeypatch.setattr(parquet_rows, "_MAX_PAGE_BYTES", 1 << 20)
    rows = [{"messages": str(i) * 3000, "text": "x" * 9999} for i in range(400)]
    options = {"use_dictionary": False, "row_group_size": 300}
    small = write(tmp_path / "a", rows, write_batch_size=8, data_page_size=1 << 16, **options)
    assert len(read(small)[0]) == 400
    monkeypatch.setattr(parquet_rows, "_read", None)
    _, [fault] = read(write(tmp_path / "b", rows, compression="none", **options))
    assert (fault.reason, fault.ends_file) == ("pages too large", True)
    assert f"{tmp_path / 'b'}: reading row group 0 takes 4" in fault.message
