"""Reads config.json: both spellings of a key, assumed defaults, what cannot be honoured."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURE_NAME = "DeepseekV3ForCausalLM"
MODEL_TYPE = "deepseek_v3"

FP8_QUANTIZATION: Mapping[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
"""`quantization_config` of a checkpoint in DeepSeek's FP8 format."""

_HONOURED: Mapping[str, tuple[Any, ...]] = {
    "topk_method": ("noaux_tc",),
    "scoring_func": ("sigmoid",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "attention_dropout": (0.0, None),
    "mlp_bias": (False, None),
    "moe_layer_freq": (1,),
    "rope_interleave": (True,),
}
"""Keys that change the numbers, of which the model knows one meaning; a missing key has it."""

_SPELLINGS: Mapping[str, str] = {
    "num_nextn_predict_layers": "num_mtp_layers",
    "n_routed_experts": "num_local_experts",
}
"""Second names that transformers accepts for a key."""

_DERIVED: Mapping[str, tuple[str, ...]] = {
    "num_key_value_heads": ("num_attention_heads",),
    "head_dim": ("qk_rope_head_dim",),
    "qk_head_dim": ("qk_nope_head_dim", "qk_rope_head_dim"),
}
"""Keys whose value must be the sum of others."""

REWRITTEN = frozenset(
    {
        *("architectures", "quantization_config", "dtype", "torch_dtype", "transformers_version"),
        *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"),
        *("topk_method", "scoring_func", "hidden_act", "attention_bias", "attention_dropout"),
        *("moe_layer_freq", *_SPELLINGS.values(), *_DERIVED),
    }
)
"""Keys that are written from the architecture, so they are not carried over as unknown ones."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A config.json being read, and what came of it so far."""

    content: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)
    """Reasons to refuse the file; all are collected before the error is raised."""
    assumed: list[str] = field(default_factory=list)
    """Defaults taken for what the file does not say."""

    def refuse(self, key: str, got: Any, expected: Any) -> None:
        """Notes a value that would give the numbers another meaning than the model's."""
        self.problems.append(f"{key} = {got!r} cannot be honoured (expected {expected!r})")

    def value(self, key: str, default: Any) -> Any:
        """`content[key]` or its second spelling; where both are missing, the default, noted."""
        spellings = (key, _SPELLINGS.get(key))
        names = [name for name in spellings if name and name in self.content]
        if not names:
            self.assumed.append(f"{key} = {default!r}")
            return default
        first, *others = (self.content[name] for name in names)
        if others and others[0] != first:
            self.problems.append(
                f"{names[0]} = {first!r} and {names[1]} = {others[0]!r} name the same number; "
                "remove one"
            )
        return float(first) if isinstance(default, float) and type(first) is int else first


def read_config_json(path: Path) -> dict[str, Any]:
    """Content of a config.json, given its path or its directory."""
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the config.json of a {ARCHITECTURE_NAME}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def another_model(content: Mapping[str, Any]) -> str | None:
    """Why this is not the config.json of a DeepSeek-V3; None where it is.

    The architecture decides, not `model_type`: Kimi-K2 is a DeepSeek-V3 under its own type.
    """
    names = content.get("architectures")
    if names:
        is_ours = isinstance(names, list) and ARCHITECTURE_NAME in names
    else:  # transformers saves a config without its model so
        is_ours = content.get("model_type") == MODEL_TYPE
    if is_ours:
        return None
    return (
        f"expected architectures to hold {ARCHITECTURE_NAME}, got architectures {names!r} and "
        f"model_type {content.get('model_type')!r}; only DeepSeek-V3 / R1 models can be read"
    )


def check_meaning(reading: Reading, values: Mapping[str, Any]) -> None:
    """Notes the keys that give the numbers a meaning which the model cannot honour.

    Args:
        reading: The file.
        values: What was read for each key, defaults included.
    """
    content = reading.content
    for key, allowed in _HONOURED.items():
        if key in content and content[key] not in allowed:
            reading.refuse(key, content[key], allowed[0])
    for key, parts in _DERIVED.items():
        numbers = [values[part] for part in parts]
        given = content.get(key)
        if given is None or any(type(number) is not int for number in numbers):
            continue
        if given != sum(numbers):
            expected = f"{' + '.join(parts)} = {sum(numbers)}"
            reading.problems.append(f"{key} = {given!r} must be {expected}")
    if not _is_fp8_or_none(content.get("quantization_config")):
        reading.problems.append(
            f"quantization_config = {content['quantization_config']!r} is not DeepSeek's FP8 in "
            "128x128 blocks; convert the weights to BF16 first"
        )


def _is_fp8_or_none(quantization: Any) -> bool:
    if quantization is None:
        return True
    # transformers' FP8 knows only these and need not write them.
    optional = {"activation_scheme": "dynamic", "fmt": "e4m3"}
    return isinstance(quantization, Mapping) and all(
        quantization.get(key, optional.get(key)) == value for key, value in FP8_QUANTIZATION.items()
    )
