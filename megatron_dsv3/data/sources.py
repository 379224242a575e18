"""Rows of chat files, one at a time: a JSON array of objects, or JSONL (an object a line).

Which of the two a file is, its first character says. An array is read in chunks and never held
whole. A file that isn't what it should be is a `ValueError` that gives line, column and byte.
Streaming parsers on the package index don't tell where they stopped, so the array's frame is read
here and each row by Python's own decoder.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from megatron_dsv3.data.messages import kind_of

MAX_ROW_BYTES = 1 << 28
"""A longer row is an error: it is rather a file of another kind than a conversation."""

_CHUNK_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
_WORDS = ("true", "false", "null")
# The longest thing that a chunk's end can cut so that it looks wrong rather than unfinished:
# an escaped surrogate pair.
_LONGEST_CUT = len(r"\ud83d\ude00")


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in its file; `messages` is not checked yet."""

    source: str
    """`file:row`, as messages and sample ids name it."""
    row: int
    """Line number in JSONL, position in an array; both count from 1."""
    messages: object


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of one file, in order."""
    if path.is_dir():
        raise ValueError(f"{path}: expected a JSON or JSONL file, got a directory")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    number = 0
    with path.open("rb") as file:
        first = _first_byte(file)
        if first not in (b"", b"[", b"{"):
            raise ValueError(f"{path}: expected a JSON array or JSONL, got {first!r} at its start")
        rows = _array_rows(file, path) if first == b"[" else _line_rows(file, path)
        for number, value in rows:
            yield _row(path, number, value)
    if number == 0:
        raise ValueError(f"{path}: no rows in it; expected at least one object with messages")


def _first_byte(file: BinaryIO) -> bytes:
    """The first byte that is no space, or none; leaves the file after its byte order mark."""
    if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        file.seek(0)
    start = file.tell()
    first = file.read(1)
    while first.isspace():
        first = file.read(1)
    file.seek(start)
    return first


def _row(path: Path, number: int, value: object) -> Row:
    source = f"{path}:{number}"
    if not isinstance(value, Mapping):
        raise ValueError(f"{source}: expected an object with messages, got {kind_of(value)}")
    if "messages" not in value:
        keys = ", ".join(value) or "none"
        raise ValueError(f"{source}: expected an object with the key messages, got the keys {keys}")
    if value.get("tools"):
        raise ValueError(
            f"{source}: DeepSeek's templates write no tool definitions, so tools would be lost; "
            "put them into the system message"
        )
    return Row(source, number, value["messages"])


def _line_rows(file: BinaryIO, path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    start = file.tell()
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise ValueError(f"{path}:{number}: a line of more than {MAX_ROW_BYTES} bytes")
        if line.strip():
            yield number, _decode_line(line, path, number, start)
        start += len(line)


def _decode_line(line: bytes, path: Path, number: int, start: int) -> Any:
    text = ""
    try:
        # Without its line break, so that the place of an error lies in this line.
        text = line.decode().rstrip("\r\n")
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, start + error.start, error) from None
    except json.JSONDecodeError as error:
        byte = start + len(text[: error.pos].encode())
        raise ValueError(
            f"{path}:{number}:{error.colno} (byte {byte}): {error.msg}; "
            "expected one whole JSON object a line"
        ) from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}:{number} (byte {start}): {_unreadable(error)}") from None


def _not_utf8(path: Path, byte: int, error: UnicodeDecodeError) -> ValueError:
    value = error.object[error.start]
    return ValueError(f"{path}: byte {byte}: expected UTF-8, got 0x{value:02x} ({error.reason})")


def _unreadable(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _array_rows(file: BinaryIO, path: Path) -> Iterator[tuple[int, Any]]:
    cursor = _Cursor(file, path)
    cursor.expect("[", row=0)
    number = 0
    if cursor.peek(row=0) != "]":
        while True:
            number += 1
            yield number, cursor.decode(number)
            if cursor.peek(number) != ",":
                break
            cursor.expect(",", number)
    cursor.expect("]", number)
    if cursor.skip_space():
        cursor.fail(cursor.position, "text after the array's closing bracket")


class _Cursor:
    """A place in a JSON file: the text read ahead from there, and where that text begins."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file = file
        self.path = path
        self.text = ""
        self.position = 0
        self.ended = False
        # Of text[0]: offset in the file, and line and column from 1.
        self.byte = file.tell()
        self.line, self.column = 1, 1
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()

    def read(self, num_bytes: int) -> None:
        """Read on, and forget what lies behind; at the end of the file set `ended`."""
        self._forget()
        chunk = self.file.read(num_bytes)
        self.ended = not chunk
        try:
            self.text += self._utf8.decode(chunk, final=self.ended)
        except UnicodeDecodeError as error:
            start = self.file.tell() - len(error.object) + error.start
            raise _not_utf8(self.path, start, error) from None

    def _forget(self) -> None:
        done = self.text[: self.position]
        self.byte, self.line, self.column = self._place(self.position)
        self.text = self.text[len(done) :]
        self.position = 0

    def _place(self, position: int) -> tuple[int, int, int]:
        done = self.text[:position]
        lines = done.count("\n")
        column = len(done) - done.rfind("\n") if lines else self.column + len(done)
        return self.byte + len(done.encode()), self.line + lines, column

    def skip_space(self) -> str:
        """Move to the next character that is no space; empty at the end of the file."""
        while True:
            if space := _SPACE.match(self.text, self.position):
                self.position = space.end()
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            self.read(_CHUNK_BYTES)

    def peek(self, row: int) -> str:
        found = self.skip_space()
        if not found:
            self.fail_truncated(row)
        return found

    def expect(self, bracket: str, row: int) -> None:
        found = self.peek(row)
        if found != bracket:
            self.fail(self.position, f"expected ',' or ']' after row {row}, got {found!r}")
        self.position += 1

    def decode(self, row: int) -> Any:
        """The value that begins here, which is moved past."""
        self.peek(row)
        while True:
            try:
                # A number cut by the chunk's end would pass for a shorter one, but is no row.
                value, self.position = self._json.raw_decode(self.text, self.position)
                return value
            except json.JSONDecodeError as error:
                self._check_unfinished(error, row)
            except (RecursionError, ValueError) as error:
                self.fail(self.position, _unreadable(error))
            # As much again as there is: a long row is then parsed a few times, not once a chunk.
            self.read(max(_CHUNK_BYTES, len(self.text) - self.position))

    def _check_unfinished(self, error: json.JSONDecodeError, row: int) -> None:
        """Return only where more text may mend the error."""
        rest = self.text[error.pos :].rstrip()
        in_string = error.msg.startswith("Unterminated string")
        if self.ended and (in_string or any(word.startswith(rest) for word in _WORDS)):
            self.fail_truncated(row)
        if self.ended or (not in_string and len(rest) > _LONGEST_CUT):
            self.fail(error.pos, error.msg)
        if len(self.text) - self.position > MAX_ROW_BYTES:
            self.fail(self.position, f"row {row} is longer than {MAX_ROW_BYTES} bytes")

    def fail(self, position: int, problem: str) -> NoReturn:
        byte, line, column = self._place(position)
        raise ValueError(f"{self.path}:{line}:{column} (byte {byte}): {problem}")

    def fail_truncated(self, row: int) -> NoReturn:
        self.fail(len(self.text), f"the file ends inside the array, at row {row}; is it cut off?")
