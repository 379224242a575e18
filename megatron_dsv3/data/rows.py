"""Rows of input files as records, and what is wrong with those that are none.

A file yields items in order: lines (JSON not read yet), blocks of a table, faults. `decode` turns
an item into rows and faults; it costs time, so workers do it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

MAX_ROW_BYTES = 1 << 24
"""A longer row is a fault: it is rather a file of another kind than a conversation."""

_MOST_NAMES, _LONGEST_NAME = 8, 60


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in its file; `value` is not checked yet."""

    path: str
    number: int
    """Line in JSONL, position in an array or a table; all count from 1."""
    value: object
    byte: int | None = None
    """Where it begins in the (decompressed) file; None in a table."""

    @property
    def source(self) -> str:
        """`file:row`, as sample ids name it."""
        return f"{self.path}:{self.number}"

    @property
    def place(self) -> str:
        """As messages name it."""
        return self.source if self.byte is None else f"{self.source} (byte {self.byte})"


@dataclass(frozen=True, slots=True)
class Fault:
    """What keeps a row, or the rest of a file, from being read."""

    reason: str
    """A few words that are the same for every fault of its kind, to be counted by."""
    message: str
    """Place, expected, got."""
    ends_file: bool = False
    num_bytes: int = 0


class RowError(ValueError):
    """A `Fault` on its way up."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Line:
    """A line of JSONL as bytes, its break included; or an element of an array."""

    path: str
    number: int
    byte: int
    content: bytes

    @property
    def num_bytes(self) -> int:
        """Size in memory, about."""
        return len(self.content)


@dataclass(frozen=True, slots=True)
class Table:
    """Consecutive rows of a table, as an Arrow stream."""

    path: str
    number: int
    """Of the first row."""
    content: bytes
    share: float
    """Of the file's rows that lie before the end of these."""

    @property
    def num_bytes(self) -> int:
        """Size in memory, about."""
        return len(self.content)


Item = Line | Table | Fault


def decode(item: Item) -> Iterator[Row | Fault]:
    """The rows of an item, or what is wrong with them."""
    if isinstance(item, Fault):
        yield item
    elif isinstance(item, Table):
        yield from _table_rows(item)
    else:
        yield _decode_line(item)


def _table_rows(table: Table) -> Iterator[Row | Fault]:
    # Arrow takes 25 MB in each worker, and most inputs are JSON.
    import pyarrow as pa

    with pa.ipc.open_stream(table.content) as stream:
        rows = stream.read_all()
    for i in range(len(rows)):
        number = table.number + i
        try:
            [row] = rows.slice(i, 1).to_pylist()
        except (ValueError, OverflowError) as error:
            # Arrow holds what Python cannot: strings of any bytes, times beyond the year 9999.
            where = f"{table.path}:{number}"
            yield Fault("not readable", f"{where}: expected text and numbers, got {error}")
            continue
        value = {name: _without_nulls(column) for name, column in row.items()}
        yield Row(table.path, number, value)


def _without_nulls(value: object) -> object:
    """A table gives every object the keys of all: arguments of a call have those of other tools."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _decode_line(line: Line) -> Row | Fault:
    where = f"{line.path}:{line.number}"
    text = ""
    try:
        # Without its line break, so that the place of an error lies in this line.
        text = line.content.decode().rstrip("\r\n")
        return Row(
            line.path, line.number, json.loads(text, object_pairs_hook=unique_keys), line.byte
        )
    except UnicodeDecodeError as error:
        return Fault("not UTF-8", f"{where}: {not_utf8(line.byte + error.start, error)}")
    except json.JSONDecodeError as error:
        byte = line.byte + len(text[: error.pos].encode())
        return Fault(
            "not JSON",
            f"{where}:{error.colno} (byte {byte}): {error.msg}; "
            "expected one whole JSON object a line",
        )
    except (RecursionError, ValueError) as error:
        return Fault("not JSON", f"{where} (byte {line.byte}): {unreadable(error)}")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; without it the last of a key's values would be taken, the others lost."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"the key {shown(twice)} stands twice in one object")
    return found


def not_utf8(byte: int, error: UnicodeDecodeError) -> str:
    """Place and value of the byte that is not UTF-8."""
    value = error.object[error.start]
    return f"byte {byte}: expected UTF-8, got 0x{value:02x} ({error.reason})"


def unreadable(error: Exception) -> str:
    """Why Python's decoder gave up on JSON that may well be correct."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    # Of numbers with thousands of digits Python goes on to advise how to change its limit.
    return str(error).partition(";")[0]


def kind_of(value: Any) -> str:
    """What JSON calls the type of a value, for messages."""
    names = {type(None): "null", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def names_of(keys: Iterable[object]) -> str:
    """Names that a file gave, for messages: some of them, none long, nothing a terminal obeys."""
    names = [str(key) for key in keys]
    shown = [name[:_LONGEST_NAME] for name in names[:_MOST_NAMES]]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return (", ".join(n if n.isprintable() else ascii(n) for n in shown) or "none") + more


def shown(value: object) -> str:
    """A value that a file gave, for messages."""
    try:
        text = repr(value)
    except RecursionError:
        return kind_of(value)
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 3]}..."
