"""Small stores for tests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_dsv3.data.manifest import Recipe, Source
from megatron_dsv3.data.store import StoreWriter

RECIPE = Recipe(
    tokenizer="t" * 64,
    template="deepseek_r1",
    template_fingerprint="f" * 64,
    options={"history_reasoning": "strip"},
    sources=(Source(path="a.jsonl", size=3, sha256="a" * 64),),
)


def write_store(
    directory: Path,
    samples: Sequence[tuple[list[int], list[list[int]]]],
    recipe: Recipe = RECIPE,
) -> Path:
    """A store of (tokens, loss spans), named s:0, s:1 and so on."""
    with StoreWriter(directory) as writer:
        for i, (tokens, spans) in enumerate(samples):
            writer.add(f"s:{i}", np.array(tokens, np.int32), np.array(spans, np.int32))
        writer.finish(recipe)
    return directory
