"""Small DeepSeek-V3 checkpoints in BF16 and in DeepSeek's FP8, for tests of the converter."""

import json
from pathlib import Path
from typing import Any

import hf_reference
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.hf_config import FP8_QUANTIZATION
from megatron_dsv3.convert.hf_io import write_index
from megatron_dsv3.convert.mapping import by_hf_name, hf_copies
from megatron_dsv3.convert.safetensors_file import TensorInfo, info_of

# Wider than one block, and no multiple of it.
WIDE = {"hidden_size": 192, "intermediate_size": 320, "moe_intermediate_size": 144}


def bf16_tensors(**changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors under their published names."""
    reference = hf_reference.build(**changes)
    config = json.loads(reference.model.config.to_json_string(use_diff=False))
    config["architectures"] = ["DeepseekV3ForCausalLM"]
    return config, {
        name: tensor.detach().clone().to(torch.float32 if "e_score" in name else torch.bfloat16)
        for name, tensor in reference.tensors().items()
    }


def fp8_tensors(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same quantised as DeepSeek does, with scales that are not amax / 448."""
    arch = Architecture.from_hf(config)
    quantised = {name for name, param in by_hf_name(arch).items() if param.quantised}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in quantised:
            found[name] = tensor
            continue
        rows, cols = tensor.shape
        blocks = -(-rows // 128), -(-cols // 128)
        scales = (torch.rand(blocks) + 1.0) * 1e-3
        whole = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :cols]
        found[name] = (tensor.float() / whole).clamp(-448, 448).to(torch.float8_e4m3fn)
        found[name + "_scale_inv"] = scales
    return found


def save(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Writes a directory of one file."""
    directory.mkdir(parents=True, exist_ok=True)
    if any(name.endswith("_scale_inv") for name in tensors):
        config = config | {"quantization_config": dict(FP8_QUANTIZATION)}
    (directory / "config.json").write_text(json.dumps(config))
    # Copies share their memory in the reference, which the library refuses.
    contiguous = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def in_two_shards(directory: Path) -> list[Path]:
    """Splits the single file of a directory into two shards with an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = list(tensors)
    halves = [names[:100], names[100:]]
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    layout = {}
    for file, half in zip(files, halves, strict=True):
        save_file({n: tensors[n] for n in half}, directory / file)
        layout[file] = {n: info_of(tensors[n]) for n in half}
    write_index(directory, layout)
    return [directory / file for file in files]


class InMemory:
    """A source of tensors that are there."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def infos(self) -> dict[str, TensorInfo]:
        return {name: info_of(tensor) for name, tensor in self.tensors.items()}

    def read(self, name: str, rows: slice | None = None, *, out: Tensor | None = None) -> Tensor:
        tensor = self.tensors[name] if rows is None else self.tensors[name][rows]
        return tensor if out is None else out.copy_(tensor)


def without_copies(config: dict[str, Any], tensors: dict[str, Tensor]) -> InMemory:
    """What a source gives: no tensor that only repeats another one."""
    copies = hf_copies(Architecture.from_hf(config))
    return InMemory({name: tensor for name, tensor in tensors.items() if name not in copies})
