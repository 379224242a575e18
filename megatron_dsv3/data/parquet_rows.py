"""Items of Parquet files: blocks of rows with the columns that conversations are made of.

Bounded twice against bombs: by the sizes in the file's footer before anything is read, and by what
comes out of each batch, since a dictionary lets a few bytes stand for any number of long strings.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_dsv3.data import compressed
from megatron_dsv3.data.rows import MAX_ROW_BYTES, RowError, Table, names_of
from megatron_dsv3.data.schemas import ROW_KEYS, SCHEMAS

MAGIC = b"PAR1"

_BATCH_ROWS = 16
"""Rows decoded at once: each may be as long as the longest value in the file."""


def tables(path: Path) -> Iterator[Table]:
    """All rows of the file, some at a time.

    Raises:
        RowError: It is no Parquet file, is damaged, a bomb, or has no column of conversations.
    """
    try:
        # Pages are read one after the other, not a whole row group.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            _check_footer(path, file.metadata)
            yield from _read(path, file)
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


def _read(path: Path, file: Any) -> Iterator[Table]:
    size = max(1, path.stat().st_size)
    columns = [name for name in file.schema_arrow.names if name in ROW_KEYS]
    if not any(name in SCHEMAS for name in columns):
        found = names_of(file.schema_arrow.names)
        expected = " or ".join(SCHEMAS)
        raise RowError("unknown schema", f"{path}: expected a column {expected}, got {found}")
    number, total = 1, 0
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns, use_threads=False):
        total += batch.nbytes
        _check_size(path, total, size)
        if batch.nbytes > len(batch) * MAX_ROW_BYTES:
            raise RowError(
                "longer than a row may be",
                f"{path}:{number}: {len(batch)} rows of {batch.nbytes} bytes; expected at most "
                f"{MAX_ROW_BYTES} bytes a row",
            )
        end = number + len(batch)
        yield Table(str(path), number, _as_stream(batch), (end - 1) / file.metadata.num_rows)
        number = end


def _as_stream(batch: Any) -> bytes:
    # Pickling a batch would send the whole buffers that it is a slice of.
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue()
