"""Calls of `prepare` for its tests: chat files, a store, and what is in it."""

import json
from dataclasses import replace

from chat_cases import assistant, deepseek_tokenizer, user

from megatron_dsv3.data.pipeline import SampleOptions
from megatron_dsv3.data.prepare import PrepareOptions, prepare
from megatron_dsv3.data.store import Store

GOOD = [user("q"), assistant("a")]


def write_rows(path, *conversations):
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in conversations))
    return path


def run(target, *paths, template="deepseek_r1", seq_length=4096, num_workers=1, **options):
    """`prepare` in this process; options of samples and of the run alike."""
    samples = {k: options.pop(k) for k in ("too_long", "history_reasoning") if k in options}
    return prepare(
        paths,
        target,
        tokenizer=deepseek_tokenizer(),
        options=PrepareOptions(
            template=template,
            samples=SampleOptions(seq_length=seq_length, **samples),
            num_workers=num_workers,
            **options,
        ),
    )


def samples_of(target):
    """Copies: a store's arrays are views of its files and end with it."""
    store = Store(target)
    samples = [store.sample(i) for i in range(len(store))]
    return [replace(sample, tokens=sample.tokens.copy()) for sample in samples]
