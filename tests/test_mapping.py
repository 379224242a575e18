"""The table against the published model and against transformers, without reading a weight."""

import time
from dataclasses import replace

import hf_reference
import pytest
from safetensors import safe_open

from megatron_dsv3.config.architecture import DEEPSEEK_V3, Architecture
from megatron_dsv3.convert.mapping import (
    Shard,
    by_hf_name,
    by_mcore_name,
    expand,
    exported_copies,
    global_name,
    hf_copies,
    local_name,
    mcore_copies,
)

SMALL = replace(
    DEEPSEEK_V3, num_layers=5, num_dense_layers=1, hidden_size=16, ffn_hidden_size=24,
    moe_ffn_hidden_size=8, num_experts=8, num_groups=4, num_groups_per_token=2,
    num_experts_per_token=4, num_heads=4, q_lora_rank=12, kv_lora_rank=8, qk_head_dim=4,
    qk_rope_head_dim=2, v_head_dim=4, vocab_size=32,
)  # fmt: skip
VARIANTS = {
    "V3": DEEPSEEK_V3,
    "small": SMALL,
    "full-rank queries": replace(SMALL, q_lora_rank=None),
    "tied": replace(SMALL, tie_embeddings=True),
    "two MTP": replace(SMALL, num_mtp_layers=2),
    "no MTP": replace(SMALL, num_mtp_layers=0),
    "all dense": replace(SMALL, num_dense_layers=5),
    "two shared experts": replace(SMALL, num_shared_experts=2),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def arch(request) -> Architecture:
    return request.param


def test_every_name_appears_exactly_once_on_both_sides(arch):
    params = list(expand(arch))
    mcore = [param.mcore for param in params]
    hf = [name for param in params for name in param.hf]
    assert len(set(mcore)) == len(mcore)
    assert len(set(hf)) == len(hf)
    assert not set(hf) & set(hf_copies(arch))
    assert set(hf_copies(arch).values()) <= set(hf)
    assert by_mcore_name(arch) == dict(zip(mcore, params, strict=True))
    assert all(name in param.hf for name, param in by_hf_name(arch).items())


def test_v3_has_the_published_numbers_of_tensors_and_parameters():
    params = list(expand(DEEPSEEK_V3))
    tensors = sum(len(param.hf) for param in params) + len(exported_copies(DEEPSEEK_V3))
    scales = sum(len(param.hf) for param in params if param.quantised)
    assert (tensors, scales, tensors + scales) == (46_183, 45_808, 91_991)
    weights = [param for param in params if not param.is_buffer]
    assert sum(p.numel for p in weights if p.mtp_depth is None) == 671_026_404_352
    assert sum(p.numel for p in weights if p.mtp_depth is not None) == 11_610_067_968


def test_v3_expands_in_less_than_a_second():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert len(by_hf_name(DEEPSEEK_V3)) == 46_181
        times.append(time.perf_counter() - start)
    assert min(times) < 1


# Read off the published index and the shapes in its files.
PUBLISHED = {
    "model.embed_tokens.weight": (129280, 7168),
    "model.norm.weight": (7168,),
    "lm_head.weight": (129280, 7168),
    "model.layers.0.self_attn.q_a_proj.weight": (1536, 7168),
    "model.layers.0.self_attn.q_a_layernorm.weight": (1536,),
    "model.layers.2.self_attn.q_b_proj.weight": (24576, 1536),
    "model.layers.2.self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
    "model.layers.2.self_attn.kv_a_layernorm.weight": (512,),
    "model.layers.60.self_attn.kv_b_proj.weight": (32768, 512),
    "model.layers.60.self_attn.o_proj.weight": (7168, 16384),
    "model.layers.2.mlp.up_proj.weight": (18432, 7168),
    "model.layers.2.mlp.down_proj.weight": (7168, 18432),
    "model.layers.3.mlp.gate.weight": (256, 7168),
    "model.layers.3.mlp.gate.e_score_correction_bias": (256,),
    "model.layers.3.mlp.shared_experts.gate_proj.weight": (2048, 7168),
    "model.layers.3.mlp.experts.255.up_proj.weight": (2048, 7168),
    "model.layers.61.mlp.experts.0.down_proj.weight": (7168, 2048),
    "model.layers.61.eh_proj.weight": (7168, 14336),
    "model.layers.61.enorm.weight": (7168,),
    "model.layers.61.shared_head.norm.weight": (7168,),
}


def test_v3_has_the_published_shapes():
    params = by_hf_name(DEEPSEEK_V3)
    assert {name: params[name].hf_shape for name in PUBLISHED} == PUBLISHED


CASES = {
    "small": {},
    "full-rank queries": {"q_lora_rank": None},
    "two MTP": {"num_mtp_layers": 2},
    "tied": {"tie_word_embeddings": True},
    "two shared experts": {"n_shared_experts": 2},
    "all dense": {"first_k_dense_replace": 3, "num_mtp_layers": 0},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_names_and_shapes_are_those_that_transformers_saves(changes, tmp_path):
    model = hf_reference.build(**changes).model
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    arch = Architecture.from_hf(tmp_path)
    assert saved == {n: p.hf_shape for n, p in by_hf_name(arch).items() if p.mtp_depth is None}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_names_and_shapes_with_mtp_are_those_of_transformers_mtp_layer(changes, tmp_path):
    reference = hf_reference.build(**changes)
    arch = Architecture.from_hf(reference.save(tmp_path))
    expected = {name: tuple(tensor.shape) for name, tensor in reference.tensors().items()}
    ours = {name: param.hf_shape for name, param in by_hf_name(arch).items()}
    ours |= {copy: ours[original] for copy, original in exported_copies(arch).items()}
    assert ours == expected


def test_joined_tensors_are_gate_then_up():
    params = by_mcore_name(DEEPSEEK_V3)
    for name, stem in {
        "decoder.layers.0.mlp.linear_fc1.weight": "model.layers.0.mlp.",
        "decoder.layers.60.mlp.shared_experts.linear_fc1.weight": (
            "model.layers.60.mlp.shared_experts."
        ),
        "decoder.layers.60.mlp.experts.linear_fc1.weight255": "model.layers.60.mlp.experts.255.",
    }.items():
        assert params[name].hf == (f"{stem}gate_proj.weight", f"{stem}up_proj.weight")
    assert params[name].mcore_shape == (4096, 7168)
    assert params[name].numel == 4096 * 7168


def test_deepseek_quantises_projections_and_nothing_else(arch):
    projections = {
        *("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    for name, param in by_hf_name(arch).items():
        assert param.quantised == (name.split(".")[-2] in projections), name


def test_split_dims_are_those_of_column_and_row_parallel_linears():
    splits = {
        Shard.COLUMN: {
            *("word_embeddings", "output_layer", "linear_q_proj", "linear_q_up_proj"),
            *("linear_kv_up_proj", "linear_fc1", "eh_proj"),
        },
        Shard.ROW: {"linear_proj", "linear_fc2"},
    }
    for arch in VARIANTS.values():
        for param in expand(arch):
            module, kind = param.mcore.rsplit(".", 2)[-2:]
            split = Shard.NONE
            if kind.startswith("weight"):
                split = next((s for s, modules in splits.items() if module in modules), split)
            assert param.shard is split, param.mcore


def test_params_know_their_place():
    params = by_hf_name(replace(SMALL, num_mtp_layers=2))
    places = {
        "model.norm.weight": (None, None, None),
        "model.layers.4.input_layernorm.weight": (4, None, None),
        "model.layers.4.mlp.experts.7.up_proj.weight": (4, None, 7),
        "model.layers.5.enorm.weight": (None, 0, None),
        "model.layers.6.mlp.gate.weight": (None, 1, None),
        "model.layers.6.mlp.experts.3.down_proj.weight": (None, 1, 3),
    }
    found = {n: (params[n].layer, params[n].mtp_depth, params[n].expert) for n in places}
    assert found == places
    assert params["model.layers.6.mlp.experts.3.down_proj.weight"].is_expert
    assert not params["model.layers.6.mlp.shared_experts.down_proj.weight"].is_expert
    assert params["model.layers.6.mlp.gate.weight"].mcore == (
        "mtp.layers.1.mtp_model_layer.mlp.router.weight"
    )


def test_only_the_expert_bias_is_a_buffer(arch):
    buffers = {param.mcore for param in expand(arch) if param.is_buffer}
    routers = {param.mcore for param in expand(arch) if param.mcore.endswith("router.weight")}
    assert buffers == {name.replace("router.weight", "router.expert_bias") for name in routers}


def test_copies_point_to_what_they_repeat():
    mtp = {
        "model.layers.5.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.5.shared_head.head.weight": "lm_head.weight",
    }
    assert hf_copies(SMALL) == exported_copies(SMALL) == mtp
    assert mcore_copies(SMALL) == {}
    tied = replace(SMALL, tie_embeddings=True)
    embedding = dict.fromkeys(mtp, "model.embed_tokens.weight")
    assert exported_copies(tied) == embedding
    assert hf_copies(tied) == embedding | {"lm_head.weight": "model.embed_tokens.weight"}
    assert mcore_copies(tied) == {"output_layer.weight": "embedding.word_embeddings.weight"}


@pytest.mark.parametrize(
    ("local", "name"),
    [
        ("decoder.layers.0.input_layernorm.weight", "decoder.layers.12.input_layernorm.weight"),
        ("decoder.layers.1.mlp.router.expert_bias", "decoder.layers.31.mlp.router.expert_bias"),
        (
            "decoder.layers.1.mlp.experts.linear_fc2.weight3",
            "decoder.layers.31.mlp.experts.linear_fc2.weight67",
        ),
        (
            "mtp.layers.0.mtp_model_layer.mlp.experts.linear_fc1.weight0",
            "mtp.layers.0.mtp_model_layer.mlp.experts.linear_fc1.weight64",
        ),
        ("decoder.layers.1.mlp.linear_fc1.weight", "decoder.layers.31.mlp.linear_fc1.weight"),
        ("mtp.layers.0.enorm.weight", "mtp.layers.0.enorm.weight"),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
    ],
)
def test_local_and_global_names(local, name):
    here = {"layers": (12, 31), "expert_offset": 64}
    assert global_name(local, **here) == name
    assert local_name(name, **here, num_local_experts=8) == local


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.input_layernorm.weight",
        "decoder.layers.13.input_layernorm.weight",
        "decoder.layers.31.mlp.experts.linear_fc2.weight63",
        "decoder.layers.31.mlp.experts.linear_fc2.weight72",
    ],
)
def test_what_another_rank_holds_has_no_local_name(name):
    assert local_name(name, layers=(12, 31), expert_offset=64, num_local_experts=8) is None


def test_chunks_and_expert_ranks_share_the_layers_without_gap_or_overlap():
    held = []
    for layers in ([0, 3], [1, 4], [2]):
        for offset in range(0, SMALL.num_experts, 2):
            place = {"layers": layers, "expert_offset": offset}
            for param in expand(SMALL):
                local = local_name(param.mcore, **place, num_local_experts=2)
                if local is not None and param.is_expert and param.layer is not None:
                    assert global_name(local, **place) == param.mcore
                    held.append(param.mcore)
    assert sorted(held) == sorted(p.mcore for p in expand(SMALL) if p.is_expert and p.layer)
