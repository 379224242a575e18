"""Items of Parquet files: blocks of rows with the columns that conversations are made of.

Bounded twice against bombs: by the sizes in the file's footer before anything is read, and by what
comes out of each batch, since a dictionary lets a few bytes stand for any number of long strings.
Memory is bounded by the sizes of pages, each of which is unpacked whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_dsv3.data import compressed
from megatron_dsv3.data.parquet_pages import pages
from megatron_dsv3.data.rows import MAX_ROW_BYTES, Fault, RowError, Table, names_of
from megatron_dsv3.data.schemas import ROW_KEYS, SCHEMAS

MAGIC = b"PAR1"

_BATCH_ROWS = 4
"""Rows decoded at once: each may be as long as the longest value in the file."""
_TABLE_BYTES = 1 << 20
"""Of rows that go to a worker together, if they are more than one."""
_MAX_PAGE_BYTES = 256 << 20
"""Of the largest pages of all columns, packed and unpacked: what a reader holds at once."""


def tables(path: Path) -> Iterator[Table | Fault]:
    """All rows of the file, some at a time.

    Raises:
        RowError: It is no Parquet file, is damaged, a bomb, has no column of conversations, or has
            pages too large for memory.
    """
    try:
        # Pages are read one after the other, not a whole row group.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            _check_footer(path, file.metadata)
            columns = _columns(path, file.schema_arrow.names)
            _check_pages(path, file.metadata, columns)
            yield from _read(path, file, columns)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise RowError("damaged Parquet", f"{path}: not readable as Parquet: {reason}") from None


def _check_footer(path: Path, metadata: Any) -> None:
    size = max(1, path.stat().st_size)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    _check_size(path, sum(column.total_uncompressed_size for column in columns), size)


def _check_size(path: Path, num_bytes: int, size: int) -> None:
    bound = min(compressed.MAX_BYTES, max(compressed.FREE_BYTES, compressed.MAX_RATIO * size))
    if num_bytes > bound:
        raise RowError(
            "decompression bomb",
            f"{path}: at least {num_bytes} bytes would come out of {size}; expected at most "
            f"{compressed.MAX_RATIO} times as many and {compressed.MAX_BYTES} in all. If this is "
            "no bomb, write it as JSONL first",
        )


def _columns(path: Path, names: Sequence[str]) -> list[str]:
    columns = [name for name in names if name in ROW_KEYS]
    if not any(name in SCHEMAS for name in columns):
        expected = " or ".join(SCHEMAS)
        raise RowError(
            "unknown schema", f"{path}: expected a column {expected}, got {names_of(names)}"
        )
    if len(set(columns)) < len(columns):
        raise RowError(
            "unknown schema",
            f"{path}: a column stands twice; expected each once, got {names_of(columns)}",
        )
    return columns


def _check_pages(path: Path, metadata: Any, columns: Sequence[str]) -> None:
    with path.open("rb") as file:
        for i in range(metadata.num_row_groups):
            group = metadata.row_group(i)
            chunks = [group.column(k) for k in range(group.num_columns)]
            chunks = [c for c in chunks if c.path_in_schema.partition(".")[0] in columns]
            num_bytes = sum(_largest_page(path, file, chunk) for chunk in chunks)
            if num_bytes > _MAX_PAGE_BYTES:
                raise RowError(
                    "pages too large",
                    f"{path}: reading row group {i} takes {num_bytes} bytes at once, in pages that "
                    f"cannot be read in parts; expected at most {_MAX_PAGE_BYTES}. Write it again "
                    "with smaller row groups, or as JSONL",
                )


def _largest_page(path: Path, file: BinaryIO, chunk: Any) -> int:
    """Packed and unpacked bytes of the column's largest page, or a bound where that is little."""
    size = int(chunk.total_compressed_size)
    if (bound := size + int(chunk.total_uncompressed_size)) < _TABLE_BYTES:
        return bound
    start = chunk.data_page_offset
    if chunk.has_dictionary_page:
        start = min(start, chunk.dictionary_page_offset)
    try:
        # A dictionary stays while the pages that refer to it are read.
        largest = sorted(sum(page) for page in pages(file, start, size))
    except ValueError as error:
        raise RowError("damaged Parquet", f"{path}: not readable as Parquet: {error}") from None
    return sum(largest[-2:] if chunk.has_dictionary_page else largest[-1:])


def _read(path: Path, file: Any, columns: list[str]) -> Iterator[Table | Fault]:
    size = max(1, path.stat().st_size)
    number, total = 1, 0
    batches = file.iter_batches(
        batch_size=_batch_rows(file.metadata), columns=columns, use_threads=False
    )
    # Not `for`, which would keep a batch while the next is read.
    while (batch := next(batches, None)) is not None:
        total += batch.nbytes
        _check_size(path, total, size)
        step = len(batch) if batch.nbytes <= _TABLE_BYTES else 1
        for start in range(0, len(batch), step):
            yield _item(path, number, batch.slice(start, step), file.metadata.num_rows)
            number += step
        del batch


def _batch_rows(metadata: Any) -> int:
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    row_bytes = max((g.total_byte_size // max(1, g.num_rows) for g in groups), default=0)
    return max(1, min(_BATCH_ROWS, _TABLE_BYTES // max(1, row_bytes)))


def _item(path: Path, number: int, rows: Any, num_rows: int) -> Table | Fault:
    if rows.nbytes > len(rows) * MAX_ROW_BYTES:
        problem = f"a row of {rows.nbytes} bytes; expected at most {MAX_ROW_BYTES}"
        return Fault("longer than a row may be", f"{path}:{number}: {problem}")
    return Table(str(path), number, _as_stream(rows), (number - 1 + len(rows)) / num_rows)


def _as_stream(batch: Any) -> bytes:
    # Pickling a batch would send the whole buffers that it is a slice of.
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return content
