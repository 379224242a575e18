"""Stock Megatron-Core with Transformer Engine loads what the converter wrote, and the way back.

Nothing of this project is in the model: `GPTModel`, `get_gpt_decoder_block_spec` and
`dist_checkpointing` as Megatron-Core ships them.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_reference
import pytest
import torch
from hf_reference import REAL_HEADS, Reference
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from torch import Tensor

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.model.config import mcore_config
from megatron_dsv3.model.groups import Groups

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 128
FP32_TOLERANCE = 1e-4


def convert(*arguments: object) -> None:
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools/checkpoint/convert.py")]
    # The converter needs no GPU.
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def reference() -> Reference:
    return hf_reference.build(bias_std=100.0, **REAL_HEADS)


def build(hf_dir: Path, groups: Groups, dtype: torch.dtype) -> GPTModel:
    """A stock model of the directory's sizes; its weights are not set."""
    arch = Architecture.from_hf(hf_dir)
    config = mcore_config(arch, Parallel(), dtype=dtype, device=groups.device)
    decoder = get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    mtp = get_gpt_mtp_block_spec(config, decoder, use_transformer_engine=True)
    model = GPTModel(
        config,
        decoder,
        vocab_size=arch.vocab_size,
        max_sequence_length=LENGTH,
        position_embedding_type="none",  # MLA rotates inside of its layers
        mtp_block_spec=mtp,
    )
    assert not any(type(m).__module__.startswith("megatron_dsv3") for m in model.modules())
    return model.to(groups.device, dtype)


def sharded(model: GPTModel, groups: Groups, **spelling: Any) -> dict[str, Any]:
    metadata = {"dp_cp_group": groups.collection.dp_cp, **spelling}
    return {"model": model.sharded_state_dict(metadata=metadata)}


def load(model: GPTModel, directory: Path, groups: Groups) -> None:
    """Megatron-Core's own, strict both ways: a key too many or too few raises."""
    state = sharded(model, groups)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        loaded = dist_checkpointing.load(state, str(directory), strict="raise_all")
        model.load_state_dict(loaded["model"], strict=True)


def logits(model: GPTModel, tokens: Tensor) -> list[Tensor]:
    """Of the main prediction and of MTP, whose hidden states follow on the decoder's."""
    hidden: list[Tensor] = []
    hook = model.mtp.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    positions = torch.arange(LENGTH, device=tokens.device).expand_as(tokens)
    with torch.no_grad():
        main = model.eval()(tokens, positions, None)
        mtp = model.output_layer(hidden[0].chunk(2)[1])[0].transpose(0, 1)
    hook.remove()
    return [main, mtp]


def test_a_converted_checkpoint_loads_and_computes_transformers_logits(reference, groups, tmp_path):
    hf_dir = reference.save(tmp_path / "hf", dtype=torch.float32)
    convert("--to", "megatron", "--from", hf_dir, "--out", tmp_path / "mcore")
    model = build(hf_dir, groups, torch.float32)
    load(model, tmp_path / "mcore", groups)
    tokens = torch.randint(0, 128, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = reference.logits(tokens)
    for ours, theirs in zip(logits(model, tokens.to(groups.device)), expected, strict=True):
        assert (ours.cpu() - theirs).norm() / theirs.norm() < FP32_TOLERANCE


@pytest.mark.parametrize("spelling", [{}, {"singleton_local_shards": True}], ids=str)
def test_what_the_stock_model_saves_comes_back_bit_for_bit(reference, groups, tmp_path, spelling):
    hf_dir = reference.save(tmp_path / "hf", dtype=torch.bfloat16)
    convert("--to", "megatron", "--from", hf_dir, "--out", tmp_path / "mcore")
    model = build(hf_dir, groups, torch.bfloat16)
    load(model, tmp_path / "mcore", groups)
    saved, back = tmp_path / "saved", tmp_path / "back"
    saved.mkdir()
    dist_checkpointing.save(sharded(model, groups, **spelling), str(saved))
    convert("--to", "hf", "--from", saved, "--out", back, "--hf-template", hf_dir)
    original, found = hf_reference.read(hf_dir), hf_reference.read(back)
    assert original.keys() == found.keys()
    for name, tensor in original.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(tensor, found[name]), name
