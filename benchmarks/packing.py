"""Speed and fill of packing, beside TRL's best-fit decreasing on the same lengths.

    python benchmarks/packing.py [--documents 1000000] [--peer-documents 100000]

Lengths are log-normal: most documents are short, a few as long as a row. TRL packs and copies
tokens in one call, so beside it this copies them, too; rows are short then, or the copying would be
all that is timed. The peer needs `pip install trl datasets` and is left out without them.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_dsv3.data.packing import pack

Lengths = npt.NDArray[np.int32]
ROW_LENGTH = 32768
SHORTER = 32
"""Of the rows beside the peer."""


def long_tailed(num: int) -> Lengths:
    """Median 1,480 tokens, mean 2,680, one in 550 as long as a row of 32,768."""
    lengths = np.random.default_rng(0).lognormal(7.3, 1.1, num)
    return np.clip(lengths, 16, ROW_LENGTH).astype(np.int32)


def our_rows(lengths: Lengths, row_length: int) -> int:
    """Packs, and lays the tokens of all rows end to end, as TRL does."""
    bounds, tokens = _documents(lengths)
    packs = pack(lengths, row_length=row_length)
    np.concatenate([tokens[bounds[i] : bounds[i + 1]] for i in packs.documents])
    return len(packs)


def trl_rows(lengths: Lengths, row_length: int) -> int:
    """Rows that TRL makes; by default it packs every 1,000 documents by themselves."""
    import pyarrow as pa
    from datasets import Dataset, disable_progress_bars
    from trl import pack_dataset

    disable_progress_bars()
    bounds, tokens = _documents(lengths)
    column = pa.LargeListArray.from_arrays(pa.array(bounds), pa.array(tokens))
    documents = Dataset(pa.table({"input_ids": column}))
    return len(pack_dataset(documents, row_length, strategy="bfd"))


def _documents(lengths: Lengths) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Bounds and tokens; which tokens does not matter."""
    bounds = np.concatenate([[0], lengths.cumsum(dtype=np.int64)])
    return bounds, np.arange(bounds[-1], dtype=np.int32)


def timed(function: Callable[[Lengths, int], int], *arguments: Any) -> tuple[float, int]:
    """Seconds, and the number of rows."""
    began = time.perf_counter()
    num_rows = function(*arguments)
    return time.perf_counter() - began, num_rows


def main() -> None:
    """Prints a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--peer-documents", type=int, default=100_000)
    arguments = parser.parse_args()
    print(f"{'who':16} {'documents':>10} {'multiple':>8} {'seconds':>8} {'rows':>8} {'full':>8}")

    def show(who: str, lengths: Lengths, multiple: int, seconds: float, num_rows: int) -> None:
        full = lengths.sum(dtype=np.int64) / (num_rows * int(lengths.max()))
        print(f"{who:16} {len(lengths):10,} {multiple:8} {seconds:8.2f} {num_rows:8,} {full:8.3%}")

    lengths = long_tailed(arguments.documents)
    for multiple in (1, 2, 8, 16):
        began = time.perf_counter()
        packs = pack(lengths, row_length=ROW_LENGTH, multiple=multiple)
        show("this", lengths, multiple, time.perf_counter() - began, len(packs))
    if importlib.util.find_spec("trl") is None:
        print("no peer: pip install trl datasets")
        return
    short = np.maximum(lengths[: arguments.peer_documents] // SHORTER, 1)
    short[0] = row_length = ROW_LENGTH // SHORTER
    print(f"rows of {row_length}, tokens copied:")
    ours = timed(our_rows, short, row_length)
    theirs = timed(trl_rows, short, row_length)
    show("this", short, 1, *ours)
    show(f"trl {version('trl')}", short, 1, *theirs)
    print(f"{theirs[0] / ours[0]:.0f} times as fast")


if __name__ == "__main__":
    main()
