import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dsv3.data.parquet_pages import pages

ROWS = [{"text": f"{i}" * (i % 50), "list": [i, None, i * 7], "other": i % 3} for i in range(4000)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zstd", "use_dictionary": False},
        {"compression": "gzip", "data_page_version": "2.0"},
        {"compression": "none", "write_page_checksum": True},
        {"write_statistics": False, "row_group_size": 700},
    ],
)
def test_pages_and_their_headers_fill_a_column_as_the_footer_has_it(options):
    """The footer, written by another's code, counts headers and pages."""
    sink = io.BytesIO()
    small = {"data_page_size": 1000, "write_batch_size": 20}
    pq.write_table(pa.Table.from_pylist(ROWS), sink, **small, **options)
    metadata = pq.read_metadata(sink)
    for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
        for column in (group.column(i) for i in range(group.num_columns)):
            start = column.data_page_offset
            if column.has_dictionary_page:
                start = column.dictionary_page_offset
            found = list(pages(sink, start, column.total_compressed_size))
            assert len(found) > 1
            headers = column.total_compressed_size - sum(page.packed for page in found)
            unpacked = sum(page.unpacked for page in found)
            assert headers > 0
            assert unpacked == column.total_uncompressed_size - headers


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "the file ends inside a page"),
        (b"\x15\x00", "the file ends inside a page"),
        (b"\x00", "no header of a page"),
        (b"\x25\x03\x15\x00\x00", "no header of a page"),
        (b"\x1d", "field of type 13"),
        (b"\x15" + b"\xff" * 20, "a number of more than 64 bits"),
        (b"\x1c" * 20, "nested too deeply"),
    ],
)
def test_what_is_no_page_is_an_error(content, problem):
    with pytest.raises(ValueError, match=problem):
        list(pages(io.BytesIO(content), 0, 100))
