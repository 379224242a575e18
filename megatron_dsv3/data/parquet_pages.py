"""Sizes of the pages of Parquet files, by which memory is known before anything is read.

A page is read and unpacked whole, and writers that count rows may put a gigabyte into one. Readers
don't tell: each page's size stands only in the header before it, a struct in Thrift's compact
protocol (parquet.thrift, `PageHeader`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_UNPACKED_FIELD, _PACKED_FIELD = 2, 3
_MOST_NESTED = 8

# Types of Thrift's compact protocol.
_TRUE, _FALSE, _BYTE, _INTEGERS, _DOUBLE = 1, 2, 3, (4, 5, 6), 7
_BINARY, _LISTS, _STRUCT = 8, (9, 10), 12


class Page(NamedTuple):
    """Bytes of one page, without its header: in the file, and unpacked."""

    packed: int
    unpacked: int


def pages(file: BinaryIO, start: int, size: int) -> Iterator[Page]:
    """The pages of one column of a row group, which takes up `size` bytes from `start`.

    Raises:
        ValueError: What stands there is no page.
    """
    position = start
    while position < start + size:
        file.seek(position)
        page = _header(file)
        position = file.tell() + page.packed
        yield page


def _header(file: BinaryIO) -> Page:
    sizes = {}
    for number, kind in _fields(file):
        if number in (_UNPACKED_FIELD, _PACKED_FIELD) and kind in _INTEGERS:
            value = _varint(file)
            sizes[number] = (value >> 1) ^ -(value & 1)
        else:
            _skip(file, kind, _MOST_NESTED)
    if len(sizes) != 2 or min(sizes.values()) < 0:
        raise ValueError("no header of a page")
    return Page(sizes[_PACKED_FIELD], sizes[_UNPACKED_FIELD])


def _fields(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Number and type of each field of a struct; whoever asks for the next has read the value."""
    number = 0
    while head := _byte(file):
        step, kind = head >> 4, head & 15
        number = number + step if step else _varint(file) >> 1
        yield number, kind


def _skip(file: BinaryIO, kind: int, depth: int) -> None:
    if not depth:
        raise ValueError("a page's header is nested too deeply")
    if kind in _INTEGERS:
        _varint(file)
    elif kind in (_BYTE, _DOUBLE):
        file.seek(1 if kind == _BYTE else 8, 1)
    elif kind == _BINARY:
        file.seek(_varint(file), 1)
    elif kind in _LISTS:
        _skip_list(file, depth)
    elif kind == _STRUCT:
        for _, inner in _fields(file):
            _skip(file, inner, depth - 1)
    elif kind not in (_TRUE, _FALSE):  # whose value is their type
        raise ValueError(f"a page's header has a field of type {kind}")


def _skip_list(file: BinaryIO, depth: int) -> None:
    head = _byte(file)
    count = head >> 4 if head >> 4 < 15 else _varint(file)
    for _ in range(count):
        inner = head & 15
        # In a list a truth value is a byte of its own.
        _skip(file, _BYTE if inner in (_TRUE, _FALSE) else inner, depth - 1)


def _varint(file: BinaryIO) -> int:
    value = shift = 0
    byte = 128
    while byte >= 128:
        if shift > 63:
            raise ValueError("a page's header has a number of more than 64 bits")
        byte = _byte(file)
        value |= (byte & 127) << shift
        shift += 7
    return value


def _byte(file: BinaryIO) -> int:
    byte = file.read(1)
    if not byte:
        raise ValueError("the file ends inside a page")
    return byte[0]
