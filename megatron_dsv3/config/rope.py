"""Rotary embedding: base and YaRN scaling, in config.json's spellings and Megatron-Core's terms."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_dsv3.config.hf_config import Reading

DEFAULT_THETA = 10000.0
"""transformers' own default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """YaRN scaling (arXiv:2309.00071) of the rotary embedding, as transformers applies it."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    """Multiplies cos and sin; None: derived from factor, mscale and mscale_all_dim."""
    truncate: bool = True
    """Round the bounds of the corrected dimensions to whole dimensions."""

    def __post_init__(self) -> None:
        if problems := _problems(asdict(self)):
            raise ValueError("; ".join(problems))

    @property
    def mcore_mscale(self) -> float:
        """The `mscale` with which Megatron-Core arrives at transformers' attention factor.

        Megatron-Core divides `get_mscale(mscale)` by `get_mscale(mscale_all_dim)`; transformers
        only where both are set, and else takes the `attention_factor` given or `get_mscale(1)`.
        """
        if self.factor <= 1:  # Both sides are 1.0, whatever the mscale.
            return 1.0
        if self._has_both_mscales:
            assert self.mscale is not None
            return self.mscale
        ratio = self.applied_factor * self.get_mscale(self.mscale_all_dim or 0.0)
        return (ratio - 1.0) / (0.1 * math.log(self.factor))

    @property
    def applied_factor(self) -> float:
        """What transformers, and the training, multiply cos and sin by."""
        if self._has_both_mscales:
            return self.get_mscale(self.mscale or 0.0) / self.get_mscale(self.mscale_all_dim or 0.0)
        return self.attention_factor or self.get_mscale(1.0)

    @property
    def _has_both_mscales(self) -> bool:
        return self.attention_factor is None and bool(self.mscale and self.mscale_all_dim)

    def get_mscale(self, mscale: float) -> float:
        """The paper's factor of attention, weighted; 1.0 where positions are not stretched."""
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


_ORIGINAL = "original_max_position_embeddings"
_POSITIVE = frozenset({"factor", "attention_factor", "beta_fast", "beta_slow"})
_OPTIONAL: Mapping[str, Any] = {
    "mscale": None,
    "mscale_all_dim": None,
    "attention_factor": None,
    "truncate": True,
}
"""Keys that config.json leaves out where they hold this value."""

_TOP_LEVEL = ("rope_theta", _ORIGINAL, "partial_rotary_factor")
"""Keys that may stand beside `rope_scaling` instead of in it."""
_NOT_YARN = frozenset({"rope_theta", "rope_type", "type", "partial_rotary_factor"})
"""Keys of the rotary embedding that have a meaning without scaling."""


def read_rope(reading: Reading, max_position_embeddings: Any) -> tuple[Any, Yarn | None]:
    """Base and scaling, from `rope_scaling` beside `rope_theta` or from `rope_parameters`.

    What is wrong goes to `reading.problems`; the base comes back unchecked.
    """
    given = _given(reading)
    theta = given.get("rope_theta", DEFAULT_THETA)
    if "rope_theta" not in given:
        reading.assumed.append(f"rope_theta = {theta!r}")
    partial, kind = given.get("partial_rotary_factor"), given.get("rope_type")
    if partial not in (None, 1.0):
        reading.refuse("partial_rotary_factor", partial, 1.0)
    yarn = None
    scaled = sorted(given.keys() - _NOT_YARN - {_ORIGINAL})
    if kind == "yarn":
        yarn = _read_yarn(reading, given, max_position_embeddings)
    elif kind is None and scaled:
        reading.problems.append(f'rope_scaling holds {scaled} but no type; add "type": "yarn"')
    elif kind not in (None, "default"):
        reading.refuse("rope_scaling type", kind, "yarn")
    return float(theta) if type(theta) is int else theta, yarn


def write_rope(theta: float, yarn: Yarn | None) -> dict[str, Any]:
    """The keys of config.json, in the spelling that all versions of transformers and vLLM read."""
    if yarn is None:
        return {"rope_theta": theta, "rope_scaling": None}
    given = {k: v for k, v in asdict(yarn).items() if k not in _OPTIONAL or v != _OPTIONAL[k]}
    return {"rope_theta": theta, "rope_scaling": {"type": "yarn", **given}}


def _given(reading: Reading) -> dict[str, Any]:
    """The keys of the rotary embedding from every place where they may stand; they must agree."""
    content = reading.content
    places = {"config.json": {key: content[key] for key in _TOP_LEVEL if key in content}}
    for place in ("rope_scaling", "rope_parameters"):
        if isinstance(content.get(place), Mapping):
            places[place] = dict(content[place])
        elif content.get(place) is not None:
            reading.problems.append(f"{place} must be an object, got {content[place]!r}")
    _check_same_keys(reading, places)
    merged: dict[str, Any] = {}
    for place, keys in places.items():
        for key, value in keys.items():
            name = "rope_type" if key == "type" else key
            if merged.setdefault(name, value) != value:
                reading.problems.append(
                    f"{name} is {merged[name]!r} and, as {key} in {place}, {value!r}; keep one"
                )
    return merged


def _check_same_keys(reading: Reading, places: Mapping[str, Mapping[str, Any]]) -> None:
    """transformers ignores `rope_parameters` beside `rope_scaling`, so neither may say more."""
    first, second = (places.get(place) for place in ("rope_scaling", "rope_parameters"))
    if not first or not second:
        return
    if differing := sorted((first.keys() ^ second.keys()) - _NOT_YARN):
        reading.problems.append(
            f"only one of rope_scaling and rope_parameters holds {differing}; remove one of the two"
        )


def _read_yarn(
    reading: Reading, given: Mapping[str, Any], max_position_embeddings: Any
) -> Yarn | None:
    # transformers reads a null or zero beta as its default.
    values: dict[str, Any] = {
        key: float(value) if type(value) is int and key != _ORIGINAL else value
        for key, value in given.items()
        if key not in _NOT_YARN and (value or not key.startswith("beta"))
    }
    if unknown := sorted(values.keys() - {f.name for f in fields(Yarn)}):
        reading.problems.append(f"rope_scaling holds {unknown}, which cannot be honoured")
    if _ORIGINAL not in values:
        values[_ORIGINAL] = max_position_embeddings
        reading.assumed.append(f"{_ORIGINAL} = max_position_embeddings = {max_position_embeddings}")
    if "factor" not in values:
        reading.problems.append("rope_scaling of type yarn lacks its factor")
        return None
    if values["factor"] is None:
        values["factor"] = _implied_factor(max_position_embeddings, values[_ORIGINAL])
    known = {key: value for key, value in values.items() if key not in unknown}
    if problems := _problems(known):
        reading.problems.extend(problems)
        return None
    return Yarn(**known)


def _implied_factor(max_position_embeddings: Any, original: Any) -> float | None:
    """What transformers takes for a factor of null; None where the two are no positive integers."""
    if type(max_position_embeddings) is not int or type(original) is not int or original < 1:
        return None
    return max_position_embeddings / original


def _problems(values: Mapping[str, Any]) -> list[str]:
    """Values of YaRN that have a wrong type or range, or that Megatron-Core cannot express."""
    problems = [
        f"rope_scaling: {name} must be {want}, got {value!r}"
        for name, value in values.items()
        if (want := _violated(name, value))
    ]
    if problems:
        return problems
    factor, attention_factor = values["factor"], values.get("attention_factor")
    if factor <= 1 and attention_factor not in (None, 1.0):
        return [
            f"rope_scaling: attention_factor {attention_factor} cannot be honoured with factor "
            f"{factor} <= 1, where Megatron-Core takes 1.0; remove attention_factor"
        ]
    return []


def _violated(name: str, value: Any) -> str | None:
    """What this value of YaRN should be, or None where it is that."""
    if name == "truncate":
        return None if isinstance(value, bool) else "true or false"
    if value is None and name in _OPTIONAL:
        return None
    if name == _ORIGINAL:
        return None if type(value) is int and value > 0 else "a positive integer"
    is_number = type(value) in (int, float) and math.isfinite(value)
    if name in _POSITIVE:
        return None if is_number and value > 0 else "a positive number"
    return None if is_number and value >= 0 else "a number >= 0"
