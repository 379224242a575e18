"""Shards planned from the architecture alone, held against the published checkpoint's figures."""

import functools
import itertools
import time
from collections import Counter
from dataclasses import replace

import hf_reference
import pytest
import torch

from megatron_dsv3.config.architecture import DEEPSEEK_V3, Architecture
from megatron_dsv3.config.counts import count_parameters
from megatron_dsv3.convert.fp8 import SCALE_SUFFIX
from megatron_dsv3.convert.hf_plan import plan_shards

SMALL = replace(
    DEEPSEEK_V3, num_layers=4, num_dense_layers=1, num_experts=16, hidden_size=256, vocab_size=300
)


@functools.cache
def v3():
    return plan_shards(DEEPSEEK_V3, precision="fp8")


def test_the_whole_v3_is_planned_with_its_published_names_and_scales_in_a_minute():
    began = time.perf_counter()
    shards = v3()
    names = Counter(name for shard in shards for name in shard.layout)
    assert time.perf_counter() - began < 60
    assert len(names) == names.total() == 91_991
    scales = [name for name in names if name.endswith(SCALE_SUFFIX)]
    assert len(scales) == 45_808
    assert all(name.removesuffix(SCALE_SUFFIX) in names for name in scales)
    counts = count_parameters(DEEPSEEK_V3)
    copies = 2 * 129_280 * 7168
    numel = sum(t.info.nbytes // t.info.dtype.itemsize for s in shards for t in s.tensors)
    # The experts' biases are buffers, which are no parameters.
    assert numel == counts.total + counts.mtp + copies + 59 * 256


def test_types_of_the_fp8_checkpoint_are_deepseeks():
    layout = {name: info for shard in v3() for name, info in shard.layout.items()}
    expected = {
        "model.embed_tokens.weight": "torch.bfloat16 [129280, 7168]",
        "model.layers.0.mlp.gate_proj.weight": "torch.float8_e4m3fn [18432, 7168]",
        "model.layers.0.mlp.gate_proj.weight_scale_inv": "torch.float32 [144, 56]",
        "model.layers.9.self_attn.kv_a_proj_with_mqa.weight": "torch.float8_e4m3fn [576, 7168]",
        "model.layers.9.self_attn.kv_a_proj_with_mqa.weight_scale_inv": "torch.float32 [5, 56]",
        "model.layers.9.mlp.gate.weight": "torch.bfloat16 [256, 7168]",
        "model.layers.9.mlp.gate.e_score_correction_bias": "torch.float32 [256]",
        "model.layers.61.eh_proj.weight": "torch.bfloat16 [7168, 14336]",
        "model.layers.61.shared_head.head.weight": "torch.bfloat16 [129280, 7168]",
        "lm_head.weight": "torch.bfloat16 [129280, 7168]",
    }
    assert {name: str(layout[name]) for name in expected} == expected


@pytest.mark.parametrize("precision", ["bf16", "fp8", "fp32"])
def test_shards_keep_to_their_size_and_scales_stay_beside_their_weight(precision):
    shards = plan_shards(SMALL, precision=precision, shard_bytes=3_000_000)
    assert len(shards) > 20
    for shard in shards:
        assert shard.nbytes <= 3_000_000 or len(shard.tensors) == 1
        for name in shard.layout:
            assert name.removesuffix(SCALE_SUFFIX) in shard.layout
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    assert [shard.file for shard in shards] == files


def test_shards_are_as_full_as_they_can_be():
    shards = plan_shards(SMALL, precision="bf16", shard_bytes=3_000_000)
    for shard, following in itertools.pairwise(shards):
        assert shard.nbytes + following.tensors[0].nbytes > 3_000_000


def test_a_single_shard_has_transformers_name():
    (shard,) = plan_shards(SMALL, precision="bf16", shard_bytes=10**12)
    assert shard.file == "model.safetensors"


@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_of_transformers_is_planned_and_copies_know_their_original(tied):
    reference = hf_reference.build(tie_word_embeddings=tied, num_mtp_layers=2)
    arch = Architecture.from_hf(reference.model.config.to_dict())
    (shard,) = plan_shards(arch, precision="fp32")
    tensors = reference.tensors()
    assert {t.name: t.info.shape for t in shard.tensors} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    copies = [tensor for tensor in shard.tensors if tensor.name != tensor.original]
    assert len(copies) == 4
    for copy in copies:
        assert torch.equal(tensors[copy.name], tensors[copy.original])


def test_kinds_are_names_without_layer_and_expert():
    kinds = {t.kind for s in v3() for t in s.tensors}
    assert "mlp.experts.*.gate_proj.weight" in kinds
    assert "mlp.shared_experts.up_proj.weight" in kinds
    assert "model.embed_tokens.weight" in kinds
    assert len(kinds) == 29
