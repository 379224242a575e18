"""The expert layer against Megatron-Core's own, and the order of what it starts."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_dsv3.config.architecture import DEEPSEEK_V3
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import MemorySection
from megatron_dsv3.model.build import build_chunks
from megatron_dsv3.model.config import mcore_config
from megatron_dsv3.model.moe import DeepseekV3MoELayer, LocalDispatcher

ARCH = replace(
    DEEPSEEK_V3, vocab_size=64, hidden_size=32, num_layers=2, num_dense_layers=1, num_heads=2,
    ffn_hidden_size=32, moe_ffn_hidden_size=16, q_lora_rank=16, kv_lora_rank=16, qk_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, num_experts=8, num_groups=2, num_groups_per_token=1,
    num_experts_per_token=2, num_mtp_layers=0,
)  # fmt: skip
RECOMPUTE = MemorySection(recompute="selective", recompute_modules=["shared_experts", "moe_act"])
WHOLE_LAYER = MemorySection(recompute="selective", recompute_modules=["moe"])


@pytest.fixture
def layers(groups):
    """Our layer and Megatron-Core's with the same weights."""

    def make(**changes):
        config = mcore_config(
            ARCH, Parallel(), dtype=torch.float32, device=groups.device, **changes
        )
        (chunk,) = build_chunks(
            ARCH, Parallel(), groups, config, max_seq_length=64, transformer_engine=False
        )
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.normal_(0.0, 0.2, generator=generator)
        ours = chunk.decoder.layers[1].mlp
        stock = MoELayer(
            config,
            submodules=ours.submodules,
            layer_number=2,
            pg_collection=groups.collection,
        )
        stock.load_state_dict(ours.state_dict())
        return ours, stock

    return make


def _run(layer, hidden):
    hidden = hidden.clone().requires_grad_()
    output, _ = layer(hidden)
    output.square().sum().backward()
    return output.detach(), [leaf.grad for leaf in (hidden, *layer.parameters())]


@pytest.mark.parametrize(
    "memory", [MemorySection(), RECOMPUTE, WHOLE_LAYER], ids=["stored", "recomputed", "whole"]
)
def test_outputs_and_gradients_are_those_of_megatron_core(layers, memory):
    ours, stock = layers(memory=memory)
    assert type(ours) is DeepseekV3MoELayer
    assert type(ours.token_dispatcher) is LocalDispatcher
    hidden = torch.randn(50, 1, 32, generator=torch.Generator().manual_seed(6))
    (output, gradients), (expected, wanted) = _run(ours, hidden), _run(stock, hidden)
    assert expected.abs().max() > 0.1
    assert torch.equal(output, expected)
    for got, of_stock in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, of_stock, rtol=1e-5, atol=1e-5)


def test_nothing_is_sorted_where_one_rank_has_all_experts(layers, monkeypatch):
    calls = []
    sort = token_dispatcher.sort_chunks_by_idxs
    monkeypatch.setattr(
        token_dispatcher, "sort_chunks_by_idxs", lambda *a, **k: calls.append(1) or sort(*a, **k)
    )
    ours, stock = layers()
    hidden = torch.randn(8, 1, 32)
    ours(hidden)
    assert not calls
    stock(hidden)
    assert len(calls) == 2


def test_the_shared_expert_starts_after_the_counts_and_before_the_wait_for_them(
    layers, monkeypatch
):
    ours, _ = layers()
    order = []

    def noted(name, function, *arguments, **options):
        order.append(name)
        return function(*arguments, **options)

    for holder, method in (
        (ours.router, "forward"),
        (ours.shared_experts, "forward"),
        (ours.token_dispatcher, "preprocess"),
        (ours.token_dispatcher, "dispatch_postprocess"),
        (ours.experts, "forward"),
    ):
        name = f"{type(holder).__name__}.{method}"
        monkeypatch.setattr(holder, method, partial(noted, name, getattr(holder, method)))
    ours(torch.randn(8, 1, 32))
    assert order == [
        "DeepseekV3Router.forward",
        "LocalDispatcher.preprocess",
        "SharedExpertMLP.forward",
        "LocalDispatcher.dispatch_postprocess",
        "TEGroupedMLP.forward",
    ]
    assert ours._shared_output is None
