"""A small checkpoint of two shards, one of them in FP8, as tests damage and read it."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_dsv3.convert.fp8 import quantize

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

torch.manual_seed(0)
FP8, SCALE_INV = quantize(torch.randn(300, 200))
SHARDS = {
    FIRST: {"proj.weight": FP8, "proj.weight_scale_inv": SCALE_INV},
    SECOND: {"bias": torch.randn(5), "norm": torch.randn(6).bfloat16(), "w": torch.randn(8, 4)},
}


def save_shards(directory: Path, shards: dict[str, dict[str, Tensor]]) -> Path:
    for file, tensors in shards.items():
        save_file(tensors, directory / file)
    index = {name: file for file, tensors in shards.items() for name in tensors}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory
