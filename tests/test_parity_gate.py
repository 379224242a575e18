"""The parity gate in one process: passes on right models, names the layer that is wrong."""

import gc
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gate_model
import hf_reference
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.convert.bridge import Bridge
from megatron_dsv3.convert.fp8 import SCALE_SUFFIX, dequantize, quantize
from megatron_dsv3.convert.hf_layers import HFLayers
from megatron_dsv3.convert.parity_gate import clear_choice
from megatron_dsv3.model.groups import SharedError

PARTS = ["embedding", "layer 0", "layer 1", "layer 2", "logits", "MTP layer 0", "MTP logits"]


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory) -> Path:
    return hf_reference.build().save(tmp_path_factory.mktemp("hf"))


@pytest.fixture
def check(groups, hf_dir) -> Callable[..., gate_model.Report]:
    def call(directory: Path = hf_dir, **changes) -> gate_model.Report:
        return gate_model.check(directory, groups, Parallel(), **changes)

    return call


def test_a_right_model_passes_in_every_part_far_below_what_is_allowed(check):
    report = check()
    assert [d.part for d in report.differences] == [*PARTS, "loss", "MTP loss"]
    assert all(d.share < 0.1 for d in report.differences)
    assert not any(d.ties for d in report.differences)
    assert report.logits_error < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"num_mtp_layers": 2},
        {"num_mtp_layers": 0},
        {"tie_word_embeddings": True},
        {"q_lora_rank": None, "n_shared_experts": 2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"n_group": 1, "topk_group": 1},
    ],
    ids=str,
)
def test_other_architectures_pass(check, tmp_path, changes):
    report = check(hf_reference.build(**changes).save(tmp_path / "hf"))
    assert len(report.differences) == 6 + 3 * changes.get("num_mtp_layers", 1) - (
        max(0, changes.get("num_mtp_layers", 1) - 1)
    )


def test_mtp_that_the_model_leaves_out_is_not_compared(check):
    report = check(alter=gate_model.without_mtp)
    assert [d.part for d in report.differences] == [*PARTS[:5], "loss"]


MODELS = [(seed, {"num_hidden_layers": 8}) for seed in range(3)]
MODELS += [(seed, hf_reference.REAL_HEADS) for seed in (1, 2)]  # MTP's router gets other experts


@pytest.mark.parametrize(("seed", "changes"), MODELS)
def test_bf16_passes_within_its_own_bound_with_biases_that_rounding_can_outdo(
    check, tmp_path, seed, changes
):
    directory = hf_reference.build(seed, **changes).save(tmp_path / "hf", dtype=torch.bfloat16)
    report = check(directory, dtype=torch.bfloat16, longest=200)
    shares = {d.part: d.share for d in report.differences}
    assert max(shares.values()) < 0.7, shares
    assert max(shares.values()) > 0.05, "the bound would hide mistakes"
    assert all(d.ties < 0.2 * d.compared for d in report.differences)


# ---- Planted mistakes ---------------------------------------------------------------------------


def _scale(name: str, factor: float) -> Callable[[Bridge], None]:
    def damage(bridge: Bridge) -> None:
        [tensor] = [tensor for param, tensor in bridge.local_tensors() if param.mcore == name]
        tensor.data.mul_(factor)

    return damage


def _swap(name: str) -> Callable[[Bridge], None]:
    def damage(bridge: Bridge) -> None:
        [tensor] = [tensor for param, tensor in bridge.local_tensors() if param.mcore == name]
        tensor.data = torch.cat(tensor.data.chunk(2)[::-1])

    return damage


L1, L2, M0 = "decoder.layers.1.", "decoder.layers.2.", "mtp.layers.0."
DAMAGES = {
    "a norm of layer 2": (_scale(L2 + "input_layernorm.weight", 1.01), "layer 2"),
    "attention of layer 1": (_scale(L1 + "self_attention.linear_proj.weight", 1.01), "layer 1"),
    "one expert of layer 2": (_scale(L2 + "mlp.experts.linear_fc2.weight5", 1.1), "layer 2"),
    "gate and up": (_swap("decoder.layers.0.mlp.linear_fc1.weight"), "layer 0"),
    "gate and up of an expert": (_swap(L1 + "mlp.experts.linear_fc1.weight3"), "layer 1"),
    "bias dropped": (_scale(L2 + "mlp.router.expert_bias", 0.0), "layer 2"),
    "embedding": (_scale("embedding.word_embeddings.weight", 1.001), "embedding"),
    "final norm": (_scale("decoder.final_layernorm.weight", 1.001), "logits"),
    "MTP's projection": (_scale(M0 + "eh_proj.weight", 1.01), "MTP layer 0"),
    "MTP's norm": (_scale(M0 + "final_layernorm.weight", 1.01), "MTP layer 0"),
    "a NaN": (_scale(L1 + "mlp.router.weight", torch.nan), "layer 1"),
}
CHANGES = {
    "scaling factor": (lambda a: replace(a, routed_scaling_factor=1.0), "layer 1"),
    "rope type": (lambda a: replace(a, yarn=None), "layer 0"),
    "mscale": (lambda a: replace(a, yarn=replace(a.yarn, mscale_all_dim=None)), "layer 0"),
    "groups": (lambda a: replace(a, num_groups=1, num_groups_per_token=1), "layer 1"),
    "epsilon": (lambda a: replace(a, rms_norm_eps=1e-3), "layer 0"),
}


@pytest.mark.parametrize(("damage", "part"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_part_is_the_first_that_is_named(check, damage, part):
    with pytest.raises(SharedError, match=rf"first in {part}( |:)"):
        check(damage=damage)


@pytest.mark.parametrize(("alter", "part"), CHANGES.values(), ids=CHANGES.keys())
def test_a_wrong_number_is_found_in_the_first_layer_that_it_touches(check, alter, part):
    with pytest.raises(SharedError, match=rf"first in {part} "):
        check(alter=alter)


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (_swap(L2 + "mlp.experts.linear_fc1.weight3"), "layer 2"),
        (_scale(L1 + "mlp.router.expert_bias", 0.0), "layer 1"),
        (_scale(L1 + "self_attention.linear_proj.weight", 1.2), "layer 1"),
    ],
    ids=["gate and up of an expert", "bias dropped", "attention"],
)
def test_bf16_finds_a_damaged_part_too(check, tmp_path, damage, part):
    directory = hf_reference.build().save(tmp_path / "hf", dtype=torch.bfloat16)
    with pytest.raises(SharedError, match=rf"first in {part} "):
        check(directory, dtype=torch.bfloat16, damage=damage, longest=200)


def test_products_are_taken_out_of_fp8_for_the_comparison_alone(check):
    """Without Transformer Engine a product in FP8 would fail."""
    configs = []

    def in_fp8(bridge: Bridge) -> None:
        configs.append(bridge.chunks[0].config)
        configs[0].fp8 = "e4m3"

    assert all(d.share < 0.1 for d in check(damage=in_fp8).differences)
    assert configs[0].fp8 == "e4m3"


def test_other_layers_stay_unsuspected_where_one_is_wrong(check):
    with pytest.raises(SharedError) as error:
        check(damage=_scale(L1 + "self_attention.linear_proj.weight", 1.5))
    assert "also in" not in str(error.value)


def test_another_directory_is_told_apart(check, hf_dir, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(hf_dir, other)
    tensors = hf_reference.read(other)
    tensors["model.layers.1.mlp.experts.7.down_proj.weight"] *= 1.1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SharedError, match=r"other, first in layer 1 \(model\.layers\.1\)"):
        check(reference=other)


# ---- The reference ------------------------------------------------------------------------------


def test_layers_run_one_at_a_time_are_transformers_whole_model(hf_dir):
    whole, layers = hf_reference.build(), HFLayers(hf_dir)
    tokens = torch.arange(40) * 7 % 128
    with torch.no_grad():
        main, mtp = whole.logits(tokens[None])
        hidden = layers.embed(tokens)
        for index in range(layers.num_layers):
            hidden = layers.layer(index)(hidden)
        hidden = layers.norm()(hidden)
        head = layers.head()
        assert torch.allclose(head(hidden), main[0], rtol=0, atol=1e-5)
        after = layers.mtp_layer(0)(layers.embed(tokens[1:]), hidden[:-1])
        assert torch.allclose(head(after), mtp[0, :-1], rtol=0, atol=1e-5)


def test_fp8_weights_are_read_with_their_scales(tmp_path):
    reference = hf_reference.build(num_hidden_layers=2, num_mtp_layers=0)
    directory = reference.save(tmp_path / "hf")
    tensors = hf_reference.read(directory)
    name = "model.layers.1.mlp.experts.3.gate_proj.weight"
    tensors[name], tensors[name + SCALE_SUFFIX] = quantize(tensors[name])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    module = HFLayers(directory).layer(1).module
    gate, _ = module.mlp.experts.gate_up_proj[3].chunk(2)
    assert torch.equal(gate, dequantize(tensors[name], tensors[name + SCALE_SUFFIX]).float())


def test_a_layer_with_a_tensor_too_few_or_too_many_is_refused(hf_dir, tmp_path):
    tensors = hf_reference.read(hf_dir)
    tensors["model.layers.1.extra.weight"] = tensors.pop("model.layers.1.mlp.gate.weight")
    shutil.copy(hf_dir / "config.json", tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"missing \['.*1\.mlp\.gate\.weight'\], surplus \['.*extra"
    ):
        HFLayers(tmp_path).layer(1)


def test_at_most_one_part_of_the_reference_is_in_memory(check, monkeypatch):
    alive: list[weakref.ref[nn.Module]] = []
    built, together = [], []
    original = HFLayers._filled

    def filled(self, module, prefix):
        gc.collect()
        # A norm is a vector; the rest are what takes memory.
        together.append([ref().__class__.__name__ for ref in alive if ref() is not None])
        result = original(self, module, prefix)
        built.append(prefix)
        alive.append(weakref.ref(result))
        return result

    monkeypatch.setattr(HFLayers, "_filled", filled)
    check()
    assert built == [
        *(f"model.layers.{index}." for index in range(3)),
        *("model.norm.", "lm_head.", "model.layers.3.", "lm_head."),
    ]
    assert not [names for names in together if names]


def test_a_choice_is_clear_exactly_where_no_rounding_changes_it():
    layers = hf_reference.build(n_routed_experts=16)
    router = layers.model.model.layers[1].mlp.gate
    hidden = torch.randn(4000, 64, generator=torch.Generator().manual_seed(1))
    noise = 2.0**-8
    clear = clear_choice(router, hidden, noise)
    assert 0.3 < clear.float().mean() < 0.99
    with torch.no_grad():
        chosen = router(hidden)[2].sort(1).values
        changed = torch.zeros(len(hidden), dtype=torch.bool)
        for seed in range(8):
            shake = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed))
            other = router(hidden * (1 + noise * shake))[2].sort(1).values
            changed |= (other != chosen).any(1)
    assert not (changed & clear).any()
    assert changed.sum() > 0.1 * (~clear).sum(), "most left out would be for nothing"
