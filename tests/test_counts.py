"""Closed forms of parameters and FLOPs, against transformers' models on the meta device."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from megatron_dsv3.config.architecture import DEEPSEEK_V3
from megatron_dsv3.config.counts import count_parameters, document_flops, flops_per_token

SMALL = replace(
    DEEPSEEK_V3,
    vocab_size=300,
    hidden_size=64,
    num_layers=5,
    num_dense_layers=2,
    ffn_hidden_size=112,
    moe_ffn_hidden_size=24,
    num_heads=4,
    q_lora_rank=40,
    kv_lora_rank=32,
    qk_head_dim=20,
    qk_rope_head_dim=12,
    v_head_dim=28,
    num_experts=16,
    num_shared_experts=2,
    num_experts_per_token=3,
    num_groups=4,
    num_groups_per_token=2,
)
VARIANTS = {
    "small": SMALL,
    "full-rank queries": replace(SMALL, q_lora_rank=None),
    "tied": replace(SMALL, tie_embeddings=True),
    "all dense": replace(SMALL, num_dense_layers=5),
    "two mtp": replace(SMALL, num_mtp_layers=2),
    "no mtp": replace(SMALL, num_mtp_layers=0),
    "v3": DEEPSEEK_V3,
}
variants = pytest.mark.parametrize("arch", VARIANTS.values(), ids=VARIANTS.keys())

KINDS = {
    "embedding": ("embed_tokens",),
    "output": ("lm_head",),
    "attention": ("_proj", "self_attn"),
    "router": ("mlp.gate.weight",),
    "shared_experts": ("shared_experts",),
    "routed_experts": ("mlp.experts.",),
    "norms": ("norm",),
    "dense_mlp": ("mlp.",),
}
"""Parts of a name that all occur in names of this kind; the first kind that fits counts."""


def meta_model(arch):
    config = DeepseekV3Config.from_dict(arch.to_hf())
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    with torch.device("meta"):
        return DeepseekV3ForCausalLM(config)


def counts_by_kind(model):
    counts = dict.fromkeys(KINDS, 0)
    for name, parameter in model.named_parameters():
        kind = next(kind for kind, parts in KINDS.items() if all(part in name for part in parts))
        counts[kind] += parameter.numel()
    return counts


@variants
def test_every_kind_is_the_sum_over_transformers_shapes(arch):
    counts = count_parameters(arch)
    model = meta_model(arch)
    assert {kind: getattr(counts, kind) for kind in KINDS} == counts_by_kind(model)
    assert counts.total == sum(p.numel() for p in model.parameters())


@variants
def test_mtp_is_the_sum_over_transformers_mtp_layers(arch):
    main = meta_model(arch)
    with torch.device("meta"):
        mtp = MtpModel(main, arch.num_mtp_layers)
    expected = sum(p.numel() for p in mtp.layers.parameters())
    assert count_parameters(arch).mtp == expected


def test_v3_has_the_published_numbers():
    counts = count_parameters(DEEPSEEK_V3)
    assert counts.total == 671_026_404_352
    assert counts.mtp == 11_610_067_968
    assert round(counts.active / 1e9, 2) == 37.55


def test_active_leaves_out_only_the_experts_that_a_token_is_not_sent_to():
    counts = count_parameters(SMALL)
    expert = 3 * SMALL.hidden_size * SMALL.moe_ffn_hidden_size
    unused = SMALL.num_experts - SMALL.num_experts_per_token
    assert counts.total - counts.active == SMALL.num_moe_layers * unused * expert


def measured_flops(arch, seq_length):
    """Forward and backward of transformers' model on one sequence, attention in full squares."""
    model = meta_model(arch).to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.normal_(tensor, std=0.02)
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.randint(arch.vocab_size, (1, seq_length)), use_cache=False).logits
        logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("seq_length", [1, 7, 32])
@pytest.mark.parametrize("name", ["small", "full-rank queries", "tied", "all dense"])
def test_flops_are_those_that_torch_counts_but_for_the_masked_half(name, seq_length):
    arch = VARIANTS[name]
    head_dims = arch.qk_head_dim + arch.qk_rope_head_dim + arch.v_head_dim
    pair = 3 * 2 * arch.num_layers * arch.num_heads * head_dims
    num_masked = seq_length * (seq_length - 1) // 2
    ours = seq_length * flops_per_token(arch, seq_length, num_mtp_layers=0)
    assert ours == measured_flops(arch, seq_length) - num_masked * pair


def test_documents_cost_what_their_tokens_cost_each_in_its_own():
    lengths = [1, 9, 32, 9, 700]
    arch = VARIANTS["two mtp"]
    ours = document_flops(arch, num_tokens=sum(lengths), num_squares=sum(n * n for n in lengths))
    assert ours == sum(n * flops_per_token(arch, n) for n in lengths)


def test_an_mtp_layer_costs_a_layer_with_experts_its_projection_and_a_head():
    more = replace(SMALL, num_layers=SMALL.num_layers + 1)
    layer = flops_per_token(more, 9, num_mtp_layers=0) - flops_per_token(SMALL, 9, num_mtp_layers=0)
    projection = 6 * 2 * SMALL.hidden_size**2
    head = 6 * SMALL.vocab_size * SMALL.hidden_size
    for depth in (1, 2):
        ours = flops_per_token(SMALL, 9, num_mtp_layers=depth)
        alone = flops_per_token(SMALL, 9, num_mtp_layers=0)
        assert ours - alone == depth * (layer + projection + head)


def test_all_mtp_layers_of_the_model_count_by_default():
    two = VARIANTS["two mtp"]
    assert flops_per_token(two, 9) == flops_per_token(SMALL, 9, num_mtp_layers=2)
    assert flops_per_token(two, 9, num_mtp_layers=0) == flops_per_token(VARIANTS["no mtp"], 9)
