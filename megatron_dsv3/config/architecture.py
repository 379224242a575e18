"""The numbers that define a DeepSeek-V3 model, read from config.json and written back to it.

`Architecture` is the one description that model, converter, planner and tests share. Each field
names its key in Hugging Face's config.json and carries the default of transformers'
`DeepseekV3Config` (a test compares them).
"""

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from megatron_dsv3.config.hf_config import (
    ARCHITECTURE_NAME,
    FP8_QUANTIZATION,
    MODEL_TYPE,
    REWRITTEN,
    Reading,
    another_model,
    check_meaning,
    read_config_json,
)
from megatron_dsv3.config.rope import DEFAULT_THETA, Yarn, read_rope, write_rope

__all__ = ["DEEPSEEK_V3", "FP8_QUANTIZATION", "Architecture", "Yarn"]

logger = logging.getLogger(__name__)


def _hf(key: str, default: Any) -> Any:
    """A field that stands in config.json under `key`; `default` is transformers'."""
    return field(default=default, metadata={"hf": key})


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A `DeepseekV3ForCausalLM` without its weights; symbols as in the paper (arXiv:2412.19437)."""

    vocab_size: int = _hf("vocab_size", 129280)
    hidden_size: int = _hf("hidden_size", 7168)
    num_layers: int = _hf("num_hidden_layers", 61)
    num_dense_layers: int = _hf("first_k_dense_replace", 3)
    """Leading layers with a dense feed-forward; all others are mixtures of experts."""
    num_mtp_layers: int = _hf("num_nextn_predict_layers", 1)
    """Multi-token prediction layers (paper section 2.2), stored after the last decoder layer."""
    ffn_hidden_size: int = _hf("intermediate_size", 18432)
    moe_ffn_hidden_size: int = _hf("moe_intermediate_size", 2048)
    # Multi-head latent attention (paper section 2.1.1)
    num_heads: int = _hf("num_attention_heads", 128)
    q_lora_rank: int | None = _hf("q_lora_rank", 1536)
    """None: queries come from one full-rank projection."""
    kv_lora_rank: int = _hf("kv_lora_rank", 512)
    qk_head_dim: int = _hf("qk_nope_head_dim", 128)
    """Per-head query / key dims without rotary embedding."""
    qk_rope_head_dim: int = _hf("qk_rope_head_dim", 64)
    v_head_dim: int = _hf("v_head_dim", 128)
    # Mixture of experts (paper section 2.1.2)
    num_experts: int = _hf("n_routed_experts", 256)
    num_shared_experts: int = _hf("n_shared_experts", 1)
    num_experts_per_token: int = _hf("num_experts_per_tok", 8)
    num_groups: int = _hf("n_group", 8)
    num_groups_per_token: int = _hf("topk_group", 4)
    routed_scaling_factor: float = _hf("routed_scaling_factor", 2.5)
    normalize_topk: bool = _hf("norm_topk_prob", True)
    # Numerics
    rms_norm_eps: float = _hf("rms_norm_eps", 1e-6)
    initializer_range: float = _hf("initializer_range", 0.02)
    max_position_embeddings: int = _hf("max_position_embeddings", 4096)
    tie_embeddings: bool = _hf("tie_word_embeddings", False)
    rope_theta: float = DEFAULT_THETA
    yarn: Yarn | None = None
    """None: plain rotary embedding."""
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Keys of config.json that this record does not know, given back by `to_hf`."""

    def __post_init__(self) -> None:
        if problems := _problems({f.name: getattr(self, f.name) for f in fields(self)}):
            raise ValueError("; ".join(problems))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any] | Path) -> Self:
        """Reads a config.json (its path, its directory, or its content).

        Raises:
            ValueError: Not a DeepSeek-V3, or values that the model cannot honour; each is named.
        """
        content = read_config_json(config) if isinstance(config, Path) else config
        where = str(config) if isinstance(config, Path) else "config.json"
        if reason := another_model(content):
            raise ValueError(f"{where}: {reason}")
        reading = Reading(content)
        found = {f.metadata["hf"]: reading.value(f.metadata["hf"], f.default) for f in _hf_fields()}
        check_meaning(reading, found)
        theta, yarn = read_rope(reading, found["max_position_embeddings"])
        known = found.keys() | REWRITTEN
        values = {f.name: found[f.metadata["hf"]] for f in _hf_fields()}
        values |= {"rope_theta": theta, "yarn": yarn}
        if problems := [*reading.problems, *_problems(values)]:
            raise ValueError(f"{where}: " + "; ".join(problems))
        if reading.assumed:
            assumed = ", ".join(reading.assumed)
            logger.warning("%s: missing, so transformers' defaults are taken: %s", where, assumed)
        extra = {key: copy.deepcopy(value) for key, value in content.items() if key not in known}
        return cls(**values, extra=extra)

    def to_hf(self, *, dtype: str = "bfloat16", fp8: bool = False) -> dict[str, Any]:
        """The config.json of this model, complete for transformers and vLLM.

        Args:
            dtype: Data type of the unquantised weights, as torch spells it.
            fp8: Whether the weights are stored in DeepSeek's FP8 blocks.
        """
        config: dict[str, Any] = {"architectures": [ARCHITECTURE_NAME], "model_type": MODEL_TYPE}
        config |= copy.deepcopy(dict(self.extra))
        config |= {f.metadata["hf"]: getattr(self, f.name) for f in _hf_fields()}
        # vLLM looks up the expert bias only under this method, and transformers does not write it.
        config |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "hidden_act": "silu"}
        config |= {"attention_bias": False, "attention_dropout": 0.0, "moe_layer_freq": 1}
        config |= {"num_key_value_heads": self.num_heads, "torch_dtype": dtype}
        config |= write_rope(self.rope_theta, self.yarn)
        if fp8:
            config["quantization_config"] = copy.deepcopy(dict(FP8_QUANTIZATION))
        return config

    @property
    def num_moe_layers(self) -> int:
        """Decoder layers with experts, MTP not counted."""
        return self.num_layers - self.num_dense_layers

    def is_moe_layer(self, layer: int) -> bool:
        """Whether this layer (MTP layers follow the decoder's) has experts."""
        return layer >= self.num_dense_layers


def _hf_fields() -> list[Field[Any]]:
    return [f for f in fields(Architecture) if "hf" in f.metadata]


_ZERO_ALLOWED = frozenset({"num_dense_layers", "num_mtp_layers"})


def _problems(values: Mapping[str, Any]) -> list[str]:
    """Values of the wrong type or out of range, and sizes that do not go together."""
    problems = [
        f"{f.metadata['hf']} must be {want}, got {values[f.name]!r}"
        for f in _hf_fields()
        if (want := _violated(f.name, values[f.name], f.default))
    ]
    if want := _violated("rope_theta", values["rope_theta"], DEFAULT_THETA):
        problems.append(f"rope_theta must be {want}, got {values['rope_theta']!r}")
    return problems or _pair_problems(values)


def _violated(name: str, value: Any, default: Any) -> str | None:
    """What the value should be, or None where it is that."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if name == "q_lora_rank" and value is None:
        return None
    allowed, noun = ((int,), "integer") if type(default) is int else ((int, float), "number")
    # A bool is an int to isinstance; NaN fails every comparison.
    fits = type(value) in allowed and math.isfinite(value)
    if name in _ZERO_ALLOWED:
        return None if fits and value >= 0 else f"{noun} >= 0"
    return None if fits and value > 0 else f"a positive {noun}"


def _pair_problems(values: Mapping[str, Any]) -> list[str]:
    dense, layers = values["num_dense_layers"], values["num_layers"]
    problems = []
    if dense > layers:
        problems.append(f"first_k_dense_replace {dense} exceeds num_hidden_layers {layers}")
    if values["qk_rope_head_dim"] % 2:
        problems.append(f"qk_rope_head_dim must be even, got {values['qk_rope_head_dim']}")
    return problems + _routing_problems(values)


def _routing_problems(values: Mapping[str, Any]) -> list[str]:
    experts, groups = values["num_experts"], values["num_groups"]
    if experts % groups:
        return [f"n_routed_experts {experts} is not divisible by n_group {groups}"]
    per_group, kept = experts // groups, values["num_groups_per_token"]
    chosen = values["num_experts_per_token"]
    problems = []
    if per_group < 2:
        problems.append(
            f"n_routed_experts {experts} in n_group {groups} leaves one expert a group, but each "
            "group is scored by its best two"
        )
    if kept > groups:
        problems.append(f"topk_group {kept} exceeds n_group {groups}")
    if chosen > kept * per_group:
        problems.append(
            f"num_experts_per_tok {chosen} exceeds the {kept * per_group} experts of topk_group "
            f"{kept} groups of {per_group}"
        )
    return problems


DEEPSEEK_V3 = Architecture(
    max_position_embeddings=163840,
    yarn=Yarn(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0),
)
"""DeepSeek-V3 and R1, 671B."""
