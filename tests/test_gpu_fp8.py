"""FP8 training on a GPU: products in FP8 near those in bf16, weights kept in FP8, masters exact."""

import math
from dataclasses import replace
from pathlib import Path

import hf_reference
import pytest
import torch
from hf_reference import YARN
from torch import Tensor

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import OptimizerSection, PrecisionSection
from megatron_dsv3.convert.bridge import Bridge
from megatron_dsv3.convert.hf_io import HFReader
from megatron_dsv3.model.build import build_chunks, routers, wrap
from megatron_dsv3.model.config import mcore_config
from megatron_dsv3.model.groups import Groups
from megatron_dsv3.train import bench
from megatron_dsv3.train.bench import slice_of_v3
from megatron_dsv3.train.optimizer import build_optimizer

pytestmark = pytest.mark.gpu

LENGTH = 256
MODEL = {
    "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 256, "kv_lora_rank": 128,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "num_mtp_layers": 1,
    "rope_parameters": {**YARN, "original_max_position_embeddings": 64},
    "initializer_range": 0.02,
}  # fmt: skip
BF16 = PrecisionSection()
# e4m3 keeps 4 bits: each product is 3.8e-2 off (measured), a dozen in a row add up as squares do.
FP8_TOLERANCE = 0.2
CASE = bench.Case(
    name="small",
    arch=slice_of_v3(num_layers=2, num_experts=2, vocab_size=2048),
    document_length=512,
)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory) -> Path:
    reference = hf_reference.build(bias_std=100.0, **MODEL)
    return reference.save(tmp_path_factory.mktemp("hf"), dtype=torch.bfloat16)


def _bridge(hf_dir: Path, groups: Groups, precision: PrecisionSection) -> Bridge:
    arch = Architecture.from_hf(hf_dir)
    config = mcore_config(
        arch, Parallel(), dtype=torch.bfloat16, device=groups.device, precision=precision
    )
    chunks = build_chunks(
        arch, Parallel(), groups, config, max_seq_length=LENGTH, transformer_engine=True
    )
    bridge = Bridge(chunks, arch, Parallel(), groups)
    bridge.load(HFReader(hf_dir))
    return bridge


def _first_gradients(
    groups: Groups, precision: PrecisionSection
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step of the slice, on the host."""
    prepared = bench.prepare(replace(CASE, precision=precision), groups)
    loss = prepared.one()
    [chunk] = prepared.step.chunks
    gradients = {
        name: parameter.main_grad.to("cpu", torch.float32)
        for name, parameter in chunk.named_parameters()
    }
    bench.free(prepared.step.chunks, prepared.step.optimizer)
    bench.release()
    return loss, gradients


@pytest.fixture(scope="module")
def in_bf16(groups) -> tuple[float, dict[str, Tensor]]:
    return _first_gradients(groups, BF16)


@pytest.mark.parametrize(
    "precision",
    [
        PrecisionSection(fp8="blockwise"),
        PrecisionSection(fp8="tensorwise"),
        PrecisionSection(fp8="blockwise", fp8_params=True),
        PrecisionSection(fp8="blockwise", bf16_first_layers=1, bf16_last_layers=1),
    ],
    ids=["blockwise", "tensorwise", "blockwise params", "blockwise with bf16 ends"],
)
def test_fp8_losses_and_gradients_are_near_those_in_bf16(groups, in_bf16, precision):
    """On DeepSeek-V3's own widths and initial weights: small random models magnify rounding."""
    loss, gradients = in_bf16
    ours, got = _first_gradients(groups, precision)
    assert ours != loss, "nothing was computed in FP8"
    assert ours == pytest.approx(loss, rel=5e-3)
    # A norm's weight has a gradient near zero, that says more of rounding than of the recipe.
    matrices = {name: g for name, g in gradients.items() if g.dim() > 1}
    errors = {
        name: float((got[name] - wanted).norm() / wanted.norm())
        for name, wanted in matrices.items()
    }
    worst = max(errors, key=errors.__getitem__)
    squares = sum(float((got[name] - g).square().sum()) for name, g in gradients.items())
    whole = math.sqrt(squares / sum(float(g.square().sum()) for g in gradients.values()))
    assert whole < FP8_TOLERANCE, f"worst is {worst}: {errors[worst]:.2f}"
    assert errors[worst] < 2 * FP8_TOLERANCE, f"{worst}: {errors[worst]:.2f}; the whole {whole:.2f}"


def test_routers_norms_embedding_and_head_stay_out_of_fp8(groups, hf_dir):
    from transformer_engine.pytorch.tensor import QuantizedTensor

    bridge = _bridge(hf_dir, groups, PrecisionSection(fp8="blockwise", fp8_params=True))
    kinds = {
        param.mcore: isinstance(tensor, QuantizedTensor) for param, tensor in bridge.local_tensors()
    }
    plain = ("embedding", "output_layer", "router", "norm")
    assert not [n for n, in_fp8 in kinds.items() if in_fp8 and any(word in n for word in plain)]
    linears = [n for n in kinds if "linear_fc" in n and "norm" not in n]
    assert linears
    assert all(kinds[name] for name in linears)


def test_masters_of_fp8_parameters_are_the_weights_of_the_files(groups, hf_dir):
    """Not what FP8 left of them, and not what the constructor had drawn."""
    bridge = _bridge(hf_dir, groups, PrecisionSection(fp8="blockwise", fp8_params=True))
    [model] = bridge.chunks
    optimizer = build_optimizer(
        OptimizerSection(), wrap([model], model.config), dtype=torch.bfloat16
    )
    masters = sum(
        float(tensor.double().sum())
        for part in optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for tensor in group["params"]
    )
    reader = HFReader(hf_dir)
    names = [n for p, _ in bridge.local_tensors() if not p.is_buffer for n in p.hf]
    wanted = sum(float(reader.read(name).double().sum()) for name in names)
    assert masters == pytest.approx(wanted, rel=1e-9)


def test_bias_and_counters_stay_fp32_in_fp8_training(groups, hf_dir):
    bridge = _bridge(hf_dir, groups, PrecisionSection(fp8="blockwise", fp8_params=True))
    wrap(bridge.chunks, bridge.chunks[0].config)
    found = routers(bridge.chunks)
    assert found
    for router in found:
        assert router.expert_bias.dtype is torch.float32
        assert router.local_tokens_per_expert.dtype is torch.float32
