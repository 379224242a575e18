"""Items of JSON files: a JSON array of objects, or JSONL (an object a line).

An array is read in chunks and never held whole. Streaming parsers on the package index don't tell
where they stopped, so the array's frame is read here and each row by Python's own decoder.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from io import BufferedReader
from typing import BinaryIO, NoReturn

from megatron_dsv3.data.rows import (
    MAX_ROW_BYTES,
    Fault,
    Line,
    RowError,
    not_utf8,
    unreadable,
)

_CHUNK_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
_WORDS = ("true", "false", "null")
# The longest thing that a chunk's end can cut so that it looks wrong rather than unfinished:
# an escaped surrogate pair.
_LONGEST_CUT = len(r"\ud83d\ude00")


def lines(file: BinaryIO, path: str, start: int) -> Iterator[Line | Fault]:
    """The lines of JSONL that are not blank; `start`: the file's position, in bytes."""
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            problem = f"a line of more than {MAX_ROW_BYTES} bytes"
            yield Fault("longer than a row may be", f"{path}:{number} (byte {start}): {problem}")
            start += len(line)
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_ROW_BYTES)
                start += len(line)
            continue
        if line.strip():
            yield Line(path, number, start, line)
        start += len(line)


def array_rows(file: BufferedReader, path: str, start: int) -> Iterator[Line]:
    """The elements of a JSON array as text; `start`: the file's position, in bytes.

    Raises:
        RowError: Where the text stops being one; everything before has been given.
    """
    cursor = _Cursor(file, path, start)
    cursor.expect("[", row=0)
    number = 0
    if cursor.peek(row=0) != "]":
        while True:
            number += 1
            yield cursor.row(number)
            if cursor.peek(number) != ",":
                break
            cursor.expect(",", number)
    cursor.expect("]", number)
    if cursor.skip_space():
        cursor.fail(cursor.position, "text after the array's closing bracket")


class _Cursor:
    """A place in a JSON file: the text read ahead from there, and where that text begins."""

    def __init__(self, file: BufferedReader, path: str, start: int) -> None:
        self.file = file
        self.path = path
        self.text = ""
        self.position = 0
        self.ended = False
        self.num_read = start
        # A position in the text, its offset in the file, and its line and column from 1.
        self.mark = 0
        self.byte = start
        self.line, self.column = 1, 1
        self.row_number = 0
        self._fault: RowError | None = None
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        # Numbers are left to whoever decodes the row: one that Python refuses ends no file.
        self._json = json.JSONDecoder(parse_int=str, parse_float=str)

    def read(self, num_bytes: int) -> None:
        """Read on, and forget what lies behind; at the end of the file set `ended`.

        What stands in the way waits until the text before it is used up: rows lie in it.
        """
        if (fault := self._fault) is not None:
            raise RowError(fault.reason, f"{fault}; at row {self.row_number}") from None
        self._forget()
        chunk = self._chunk(num_bytes)
        self.num_read += len(chunk)
        self.ended = not chunk and self._fault is None
        try:
            self.text += self._utf8.decode(chunk, final=self.ended)
        except UnicodeDecodeError as error:
            self.text += error.object[: error.start].decode()
            self._fault = self._not_text(error)
            self.ended = False

    def _not_text(self, error: UnicodeDecodeError) -> RowError:
        byte = self.num_read - len(error.object) + error.start
        if self.ended:
            problem = f"byte {byte}: the file ends inside a character; is it cut off?"
            return RowError("file cut off", f"{self.path}: {problem}")
        return RowError("not UTF-8", f"{self.path}: {not_utf8(byte, error)}")

    def _chunk(self, num_bytes: int) -> bytes:
        """By pieces, so that an error of decompression takes none of those before it away."""
        pieces: list[bytes] = []
        while num_bytes > 0:
            try:
                piece = self.file.read1(num_bytes)
            except RowError as error:
                self._fault = error
                break
            if not piece:
                break
            pieces.append(piece)
            num_bytes -= len(piece)
        return b"".join(pieces)

    def _forget(self) -> None:
        self._move_mark()
        self.text = self.text[self.position :]
        self.mark = self.position = 0

    def _move_mark(self) -> None:
        self.byte, self.line, self.column = self._place(self.position)
        self.mark = self.position

    def _place(self, position: int) -> tuple[int, int, int]:
        done = self.text[self.mark : position]
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

    def row(self, number: int) -> Line:
        """The element that begins here, which is moved past.

        As text, not as it was decoded to find its end: that is less to send to a worker, and what
        is nested deeply can be decoded, but not pickled.
        """
        self.row_number = number
        self.peek(number)
        # Bytes are counted on from here: from the chunk's start it would be as often as there are
        # rows in the chunk.
        self._move_mark()
        byte = self.byte
        self._skip_value(number)
        return Line(self.path, number, byte, self.text[self.mark : self.position].encode())

    def _skip_value(self, number: int) -> None:
        while True:
            try:
                # A number cut by the chunk's end would pass for a shorter one, but is no row.
                _, self.position = self._json.raw_decode(self.text, self.position)
                return
            except json.JSONDecodeError as error:
                self._check_unfinished(error, number)
            except (RecursionError, ValueError) as error:
                self.fail(self.position, f"{unreadable(error)}; at row {number}")
            # As much again as there is: a long row is then parsed a few times, not once a chunk.
            self.read(max(_CHUNK_BYTES, len(self.text) - self.position))

    def _check_unfinished(self, error: json.JSONDecodeError, row: int) -> None:
        """Return only where more text may mend the error."""
        rest = self.text[error.pos :].rstrip()
        in_string = error.msg.startswith("Unterminated string")
        if self.ended and (in_string or any(word.startswith(rest) for word in _WORDS)):
            self.fail_truncated(row)
        if self.ended or (not in_string and len(rest) > _LONGEST_CUT):
            self.fail(error.pos, f"{error.msg}; at row {row}")
        if len(self.text) - self.position > MAX_ROW_BYTES:
            self.fail(self.position, f"row {row} is longer than {MAX_ROW_BYTES} bytes")

    def fail(self, position: int, problem: str, reason: str = "not JSON") -> NoReturn:
        byte, line, column = self._place(position)
        raise RowError(reason, f"{self.path}:{line}:{column} (byte {byte}): {problem}")

    def fail_truncated(self, row: int) -> NoReturn:
        problem = f"the file ends inside the array, at row {row}; is it cut off?"
        self.fail(len(self.text), problem, reason="file cut off")
