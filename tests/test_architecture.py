"""config.json in both directions, against transformers' own configuration."""

import copy
import json
import logging
from dataclasses import fields, replace

import pytest
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor,
    _yarn_get_mscale,
)
from transformers import AutoConfig, DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

from megatron_dsv3.config.architecture import (
    DEEPSEEK_V3,
    FP8_QUANTIZATION,
    Architecture,
    Yarn,
)

PUBLISHED_V3 = json.loads("""{
  "architectures": ["DeepseekV3ForCausalLM"],
  "attention_bias": false,
  "attention_dropout": 0.0,
  "auto_map": {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModel": "modeling_deepseek.DeepseekV3Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"
  },
  "aux_loss_alpha": 0.001,
  "bos_token_id": 0,
  "eos_token_id": 1,
  "ep_size": 1,
  "first_k_dense_replace": 3,
  "hidden_act": "silu",
  "hidden_size": 7168,
  "initializer_range": 0.02,
  "intermediate_size": 18432,
  "kv_lora_rank": 512,
  "max_position_embeddings": 163840,
  "model_type": "deepseek_v3",
  "moe_intermediate_size": 2048,
  "moe_layer_freq": 1,
  "n_group": 8,
  "n_routed_experts": 256,
  "n_shared_experts": 1,
  "norm_topk_prob": true,
  "num_attention_heads": 128,
  "num_experts_per_tok": 8,
  "num_hidden_layers": 61,
  "num_key_value_heads": 128,
  "num_nextn_predict_layers": 1,
  "pretraining_tp": 1,
  "q_lora_rank": 1536,
  "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64,
  "quantization_config": {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128]
  },
  "rms_norm_eps": 1e-06,
  "rope_scaling": {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn"
  },
  "rope_theta": 10000,
  "routed_scaling_factor": 2.5,
  "scoring_func": "sigmoid",
  "seq_aux": true,
  "tie_word_embeddings": false,
  "topk_group": 4,
  "topk_method": "noaux_tc",
  "torch_dtype": "bfloat16",
  "transformers_version": "4.33.1",
  "use_cache": true,
  "v_head_dim": 128,
  "vocab_size": 129280
}""")

YARN = Yarn(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)
VARIANTS = {
    "v3": {},
    "full-rank queries": {"q_lora_rank": None},
    "one group": {"num_groups": 1, "num_groups_per_token": 1},
    "no mtp": {"num_mtp_layers": 0},
    "two mtp": {"num_mtp_layers": 2},
    "plain rope": {"yarn": None, "rope_theta": 50000.0},
    "tied": {"tie_embeddings": True},
    "yarn with all keys": {
        "yarn": replace(YARN, beta_fast=16.0, beta_slow=2.0, attention_factor=1.25, truncate=False)
    },
    "every number another": {
        "vocab_size": 320,
        "hidden_size": 96,
        "num_layers": 5,
        "num_dense_layers": 2,
        "ffn_hidden_size": 160,
        "moe_ffn_hidden_size": 48,
        "num_heads": 6,
        "q_lora_rank": 40,
        "kv_lora_rank": 24,
        "qk_head_dim": 20,
        "qk_rope_head_dim": 12,
        "v_head_dim": 28,
        "num_experts": 12,
        "num_shared_experts": 2,
        "num_experts_per_token": 5,
        "num_groups": 4,
        "num_groups_per_token": 2,
        "routed_scaling_factor": 1.5,
        "normalize_topk": False,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.01,
        "max_position_embeddings": 2048,
    },
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


def published(**changes):
    """The published config with some keys replaced, or left out where the value is `...`.

    Each call gives a copy: transformers adds keys to the objects inside what it reads.
    """
    merged = {**copy.deepcopy(PUBLISHED_V3), **changes}
    return {key: value for key, value in merged.items() if value is not ...}


def published_rope(**changes):
    rope = {**PUBLISHED_V3["rope_scaling"], **changes}
    return published(rope_scaling={k: v for k, v in rope.items() if v is not ...})


def hf_keys():
    return {f.name: f.metadata["hf"] for f in fields(Architecture) if "hf" in f.metadata}


def test_every_default_is_that_of_transformers():
    ours, theirs = Architecture(), DeepseekV3Config()
    got = {key: getattr(ours, name) for name, key in hf_keys().items()}
    assert got == {key: getattr(theirs, key) for key in got}
    assert {"rope_type": "default", "rope_theta": ours.rope_theta} == theirs.rope_parameters
    assert ours.yarn is None


def test_every_number_of_transformers_config_is_a_field_or_known_to_change_nothing():
    changes_nothing = {"use_cache", "pad_token_id", "bos_token_id", "eos_token_id"}
    changes_nothing |= {"pretraining_tp", "output_router_logits"}
    checked = {"hidden_act", "rope_interleave", "attention_bias", "attention_dropout"}
    checked |= {"num_key_value_heads", "rope_parameters"}
    declared = {name for name in DeepseekV3Config.__annotations__ if name in DeepseekV3Config()}
    second_spelling = {"num_mtp_layers"}
    assert declared - changes_nothing - checked - second_spelling <= set(hf_keys().values())
    assert len(declared) > 30


def test_published_v3_reads_as_the_constant_without_assumptions(caplog):
    assert Architecture.from_hf(PUBLISHED_V3) == DEEPSEEK_V3
    assert not caplog.records


def test_a_path_and_its_directory_read_as_the_content_does(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_V3))
    assert Architecture.from_hf(tmp_path) == DEEPSEEK_V3
    assert Architecture.from_hf(tmp_path / "config.json") == DEEPSEEK_V3


def test_kimi_k2_reads_and_keeps_its_model_type():
    rope = {"factor": 32.0, "beta_fast": 1.0, "original_max_position_embeddings": 4096}
    content = published(
        model_type="kimi_k2",
        n_routed_experts=384,
        num_attention_heads=64,
        num_key_value_heads=64,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=0,
        routed_scaling_factor=2.827,
        rope_theta=50000.0,
        rope_scaling={**PUBLISHED_V3["rope_scaling"], **rope},
        max_position_embeddings=131072,
        vocab_size=163840,
    )
    arch = Architecture.from_hf(content)
    assert (arch.num_experts, arch.num_heads, arch.rope_theta) == (384, 64, 50000.0)
    assert (arch.num_groups, arch.num_mtp_layers, arch.yarn.factor) == (1, 0, 32.0)
    assert arch.to_hf()["model_type"] == "kimi_k2"
    assert Architecture.from_hf(arch.to_hf()) == arch


@variants
def test_what_is_written_reads_as_the_same_architecture(changes):
    arch = replace(DEEPSEEK_V3, **changes)
    written = json.loads(json.dumps(arch.to_hf(fp8=True)))
    assert Architecture.from_hf(written) == arch


@variants
def test_what_is_written_reads_without_assumptions(changes, caplog):
    Architecture.from_hf(replace(DEEPSEEK_V3, **changes).to_hf())
    assert not caplog.records


@variants
def test_transformers_loads_what_is_written_with_the_same_numbers(changes, tmp_path):
    arch = replace(DEEPSEEK_V3, **changes)
    (tmp_path / "config.json").write_text(json.dumps(arch.to_hf(dtype="float32")))
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, DeepseekV3Config)
    for name, key in hf_keys().items():
        assert getattr(config, key) == getattr(arch, name), key
    assert config.num_key_value_heads == arch.num_heads
    assert str(config.dtype) in ("float32", "torch.float32")
    rope = dict(config.rope_parameters)
    assert rope.pop("rope_theta") == arch.rope_theta
    assert rope.pop("rope_type") == ("yarn" if arch.yarn else "default")
    for name, value in rope.items():
        assert name == "type" or getattr(arch.yarn, name) == value, name


def test_transformers_reads_the_published_file_and_ours_alike():
    ours = Architecture.from_hf(PUBLISHED_V3).to_hf(fp8=True)
    theirs = DeepseekV3Config.from_dict(published()).to_dict()
    assert DeepseekV3Config.from_dict(ours).to_dict() == theirs


@variants
def test_what_transformers_saves_reads_as_the_same_architecture(changes, tmp_path):
    arch = replace(DEEPSEEK_V3, **changes)
    config = DeepseekV3Config.from_dict(arch.to_hf())
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_scaling" not in saved
    assert "rope_parameters" in saved
    assert Architecture.from_hf(tmp_path) == arch
    assert Architecture.from_hf(config.to_dict()) == arch


def test_a_plain_transformers_config_reads_as_the_defaults():
    assert Architecture.from_hf(DeepseekV3Config().to_dict()) == Architecture()


@pytest.mark.parametrize(
    ("key", "second"),
    [("num_nextn_predict_layers", "num_mtp_layers"), ("n_routed_experts", "num_local_experts")],
)
def test_second_spellings_are_read_and_contradictions_refused(key, second, caplog):
    value = 2 * PUBLISHED_V3[key]
    arch = Architecture.from_hf(published(**{key: ..., second: value}))
    assert arch == Architecture.from_hf(published(**{key: value}))
    assert not caplog.records
    with pytest.raises(ValueError, match=f"{key} = .* and {second} = {value} name the same number"):
        Architecture.from_hf(published(**{second: value}))


def test_unknown_keys_are_kept_and_derived_ones_are_not():
    arch = Architecture.from_hf(published(my_note={"a": [1]}, dtype="float16"))
    written = arch.to_hf()
    kept = ("auto_map", "aux_loss_alpha", "bos_token_id", "eos_token_id", "seq_aux", "use_cache")
    for key in kept:
        assert written[key] == PUBLISHED_V3[key]
    assert written["my_note"] == {"a": [1]}
    assert written["torch_dtype"] == "bfloat16"
    assert "dtype" not in written
    assert "transformers_version" not in written
    assert Architecture.from_hf(written).extra == arch.extra


def test_changing_what_was_written_changes_nothing_else():
    arch = Architecture.from_hf(published(my_note={"a": [1]}))
    written = arch.to_hf(fp8=True)
    written["my_note"]["a"].append(2)
    written["quantization_config"]["weight_block_size"].append(2)
    assert arch.extra["my_note"] == {"a": [1]}
    assert FP8_QUANTIZATION["weight_block_size"] == [128, 128]


def test_quantization_is_written_only_where_true():
    arch = Architecture.from_hf(PUBLISHED_V3)
    assert "quantization_config" not in arch.to_hf()
    assert arch.to_hf(fp8=True)["quantization_config"] == PUBLISHED_V3["quantization_config"]


@pytest.mark.parametrize(
    ("changes", "is_read"),
    [
        ({}, True),
        ({"fmt": ..., "activation_scheme": ..., "modules_to_not_convert": None}, True),
        ({"scale_fmt": "ue8m0"}, True),
        ({"activation_scheme": "static"}, False),
        ({"fmt": "e5m2"}, False),
        ({"weight_block_size": [64, 64]}, False),
        ({"weight_block_size": ...}, False),
        ({"quant_method": ...}, False),
    ],
)
def test_only_fp8_in_blocks_of_128_is_read(changes, is_read):
    quantization = {**PUBLISHED_V3["quantization_config"], **changes}
    content = published(quantization_config={k: v for k, v in quantization.items() if v is not ...})
    if is_read:
        assert Architecture.from_hf(content) == DEEPSEEK_V3
    else:
        with pytest.raises(ValueError, match="is not DeepSeek's FP8 in 128x128 blocks"):
            Architecture.from_hf(content)


def test_vllm_finds_the_keys_that_transformers_does_not_write():
    written = Architecture.from_hf(DeepseekV3Config().to_dict()).to_hf()
    assert written["architectures"] == ["DeepseekV3ForCausalLM"]
    assert written["topk_method"] == "noaux_tc"
    assert written["scoring_func"] == "sigmoid"
    assert written["num_nextn_predict_layers"] == 1


@pytest.mark.parametrize("key", [*hf_keys().values(), "rope_theta"])
def test_a_missing_key_takes_transformers_default_and_is_logged(key, caplog):
    arch = Architecture.from_hf(published(**{key: ...}))
    theirs = DeepseekV3Config.from_dict(published(**{key: ...}))
    name = {v: k for k, v in hf_keys().items()}.get(key, key)
    want = theirs.rope_parameters[key] if key == "rope_theta" else getattr(theirs, key)
    assert getattr(arch, name) == want
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{key} = {want!r}" in record.getMessage()


def test_missing_original_length_of_yarn_is_the_maximum_as_in_transformers(caplog):
    name = "original_max_position_embeddings"
    ours = Architecture.from_hf(published_rope(**{name: ...}))
    theirs = DeepseekV3Config.from_dict(published_rope(**{name: ...}))
    assert ours.yarn.original_max_position_embeddings == theirs.rope_parameters[name] == 163840
    assert f"{name} = max_position_embeddings = 163840" in caplog.text


def test_a_null_factor_of_yarn_is_the_ratio_of_lengths():
    assert Architecture.from_hf(published_rope(factor=None)).yarn.factor == 163840 / 4096


def test_null_betas_of_yarn_are_the_defaults_as_in_transformers():
    assert Architecture.from_hf(published_rope(beta_fast=None, beta_slow=None)) == DEEPSEEK_V3


def test_both_spellings_of_rope_may_stand_side_by_side_where_they_agree():
    rope = PUBLISHED_V3["rope_scaling"]
    parameters = {**rope, "rope_type": "yarn", "rope_theta": 10000.0}
    assert Architecture.from_hf(published(rope_parameters=parameters)) == DEEPSEEK_V3
    only = published(rope_scaling=..., rope_theta=..., rope_parameters=parameters)
    assert Architecture.from_hf(only) == DEEPSEEK_V3


ATTENTION_FACTORS = [
    {"mscale": mscale, "mscale_all_dim": all_dim, "attention_factor": attention_factor}
    for mscale in (None, 0.0, 0.707, 1.0, 1.3)
    for all_dim in (None, 0.0, 0.707, 1.0, 2.0)
    for attention_factor in (None, 0.5, 1.0, 1.7)
]


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.001, 2.0, 8.0, 32.0, 40.0, 1000.0])
@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_means_the_same_to_megatron_core_and_transformers(factor, truncate):
    checked = 0
    for keys in ATTENTION_FACTORS:
        if factor <= 1 and keys["attention_factor"] not in (None, 1.0):
            continue
        common = {"factor": factor, "original_max_position_embeddings": 4096, "truncate": truncate}
        yarn = Yarn(**common, **keys)
        rope = {"type": "yarn", "rope_theta": 10000.0, **common, **keys}
        config = DeepseekV3Config(rope_parameters=rope, max_position_embeddings=4096)
        _, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
        all_dim = yarn.mscale_all_dim or 0.0
        ours = _yarn_get_concentration_factor(factor, yarn.mcore_mscale, all_dim)
        assert ours == pytest.approx(attention_factor, rel=1e-12), keys
        softmax_factor = yarn_apply_mscale(config.rope_parameters, 1.0)
        assert _yarn_get_mscale(factor, all_dim) ** 2 == pytest.approx(softmax_factor, rel=1e-12)
        checked += 1
    assert checked >= 25


REFUSALS = {
    "topk_method": ("greedy", "topk_method = 'greedy' cannot be honoured .expected 'noaux_tc'"),
    "scoring_func": ("softmax", "scoring_func = 'softmax' cannot be honoured"),
    "hidden_act": ("gelu", "hidden_act = 'gelu' cannot be honoured"),
    "attention_bias": (True, "attention_bias = True cannot be honoured"),
    "attention_dropout": (0.1, "attention_dropout = 0.1 cannot be honoured"),
    "mlp_bias": (True, "mlp_bias = True cannot be honoured"),
    "moe_layer_freq": ([0, 1], r"moe_layer_freq = \[0, 1\] cannot be honoured"),
    "rope_interleave": (False, "rope_interleave = False cannot be honoured"),
    "partial_rotary_factor": (0.5, "partial_rotary_factor = 0.5 cannot be honoured"),
    "num_key_value_heads": (8, "num_key_value_heads = 8 must be num_attention_heads = 128"),
    "head_dim": (128, "head_dim = 128 must be qk_rope_head_dim = 64"),
    "qk_head_dim": (64, r"qk_head_dim = 64 must be qk_nope_head_dim \+ qk_rope_head_dim = 192"),
    "quantization_config": ({"quant_method": "gptq"}, "not DeepSeek's FP8 in 128x128 blocks"),
    "rope_scaling": ([40], r"rope_scaling must be an object, got \[40\]"),
    "original_max_position_embeddings": (8192, "original_max_position_embeddings is 8192 and"),
    "n_group": (7, "n_routed_experts 256 is not divisible by n_group 7"),
    "topk_group": (9, "topk_group 9 exceeds n_group 8"),
    "num_experts_per_tok": (129, "num_experts_per_tok 129 exceeds the 128 experts of topk_group 4"),
    "n_routed_experts": (8, "n_routed_experts 8 in n_group 8 leaves one expert a group"),
    "first_k_dense_replace": (62, "first_k_dense_replace 62 exceeds num_hidden_layers 61"),
    "qk_rope_head_dim": (63, "qk_rope_head_dim must be even, got 63"),
    "n_shared_experts": (0, "n_shared_experts must be a positive integer, got 0"),
    "num_nextn_predict_layers": (-1, "num_nextn_predict_layers must be integer >= 0, got -1"),
    "rms_norm_eps": (float("nan"), "rms_norm_eps must be a positive number, got nan"),
    "rope_theta": ("1e4", "rope_theta must be a positive number, got '1e4'"),
}


@pytest.mark.parametrize("key", REFUSALS)
def test_a_value_that_cannot_be_honoured_is_refused_by_name(key):
    value, message = REFUSALS[key]
    with pytest.raises(ValueError, match=message) as error:
        Architecture.from_hf(published(**{key: value}))
    assert str(error.value).startswith("config.json: ")
    assert "\n" not in str(error.value)


ROPE_REFUSALS = {
    "another type": ({"type": "linear"}, "rope_scaling type = 'linear' cannot be honoured"),
    "no type": ({"type": ...}, 'but no type; add "type": "yarn"'),
    "two types": ({"rope_type": "default"}, "rope_type is 'yarn' and"),
    "no factor": ({"factor": ...}, "rope_scaling of type yarn lacks its factor"),
    "text for factor": ({"factor": "40"}, "factor must be a positive number, got '40'"),
    "null factor without lengths": (
        {"factor": None, "original_max_position_embeddings": "4096"},
        "original_max_position_embeddings must be a positive integer, got '4096'",
    ),
    "bool for a number": ({"mscale": True}, "mscale must be a number >= 0, got True"),
    "text for a flag": ({"truncate": "no"}, "truncate must be true or false, got 'no'"),
    "zero": ({"attention_factor": 0.0}, "attention_factor must be a positive number, got 0.0"),
    "unknown key": ({"finetuned": True}, r"rope_scaling holds \['finetuned'\]"),
    "inexpressible": (
        {"factor": 1.0, "attention_factor": 1.5},
        "attention_factor 1.5 cannot be honoured with factor 1.0 <= 1",
    ),
    "another base": ({"rope_theta": 5e4}, "rope_theta is 10000 and, as rope_theta in rope_scaling"),
}


@pytest.mark.parametrize("case", ROPE_REFUSALS)
def test_rope_scaling_that_cannot_be_honoured_is_refused_by_name(case):
    changes, message = ROPE_REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        Architecture.from_hf(published_rope(**changes))


def test_two_ropes_that_differ_are_refused():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    with pytest.raises(ValueError, match=r"(?s)holds \['beta_fast'.*factor is 40 and") as error:
        Architecture.from_hf(published(rope_parameters=rope))
    assert "'mscale'" in str(error.value)


def wrong_types():
    for key in (*hf_keys().values(), "rope_theta"):
        for value in ("8", [8], {"a": 8}, True, None, 1.5):
            right = float if key == "rope_theta" else type(PUBLISHED_V3[key])
            if type(value) is not right and (key, value) != ("q_lora_rank", None):
                yield key, value


@pytest.mark.parametrize(("key", "value"), wrong_types())
def test_a_wrong_type_ends_in_an_error_that_names_the_key(key, value):
    with pytest.raises(ValueError, match=f"{key} must be .*, got ") as error:
        Architecture.from_hf(published(**{key: value}))
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters", "quantization_config"])
@pytest.mark.parametrize("value", ["yarn", [1], 3])
def test_wrong_types_of_objects_are_named(place, value):
    with pytest.raises(ValueError, match=place):
        Architecture.from_hf(published(**{place: value}))


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": "DeepseekV3ForCausalLM"},
        {"architectures": ..., "model_type": "deepseek_v2"},
        {"architectures": ..., "model_type": ...},
    ],
)
def test_another_model_is_refused(changes):
    with pytest.raises(ValueError, match="expected architectures to hold DeepseekV3ForCausalLM"):
        Architecture.from_hf(published(**changes))


def test_all_problems_come_in_one_error():
    content = published_rope(factor="40") | {"hidden_size": "7168", "hidden_act": "gelu"}
    with pytest.raises(ValueError, match=r"hidden_act .*; .*factor .*; hidden_size must be"):
        Architecture.from_hf(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"vocab_size": ', r"config\.json: not valid JSON: .*line 1 column 16"),
        ("[]", r"config\.json: expected a JSON object, got list"),
        (b"\xff\xfe", r"config\.json: not valid JSON"),
    ],
)
def test_a_broken_file_is_refused_with_its_name(text, message, tmp_path):
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Architecture.from_hf(tmp_path)


def test_a_missing_file_is_refused_with_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        Architecture.from_hf(tmp_path)


def test_the_record_checks_what_is_built_in_code_as_well():
    with pytest.raises(ValueError, match="n_routed_experts 20 is not divisible by n_group 8"):
        replace(DEEPSEEK_V3, num_experts=20)
    with pytest.raises(ValueError, match=r"hidden_size must be a positive integer, got 1\.5"):
        replace(DEEPSEEK_V3, hidden_size=1.5)
    with pytest.raises(ValueError, match="factor must be a positive number, got -1"):
        replace(YARN, factor=-1)


def test_layers_after_the_dense_ones_have_experts_and_mtp_too():
    assert [DEEPSEEK_V3.is_moe_layer(layer) for layer in (0, 2, 3, 60, 61)] == [
        *(False, False),
        *(True, True, True),
    ]
    assert DEEPSEEK_V3.num_moe_layers == 58
