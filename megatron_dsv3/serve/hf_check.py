"""Is a Hugging Face directory servable by vLLM? Everything that speaks against it, at once.

The checks follow what vLLM does with the directory, where that differs from what transformers does:
it takes keys of config.json that transformers never writes, and loads a model that lacks tensors of
the MTP layer only to fail when speculative decoding is asked for.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.hf_config import MODEL_TYPE, another_model, read_config_json
from megatron_dsv3.config.rope import Yarn
from megatron_dsv3.convert.hf_index import INDEX, SINGLE, listed
from megatron_dsv3.convert.hf_io import HFReader
from megatron_dsv3.convert.mapping import expand, exported_copies
from megatron_dsv3.serve.finding import Finding
from megatron_dsv3.serve.tokenizer_check import check_tokenizer

__all__ = ["Finding", "check_export", "check_hf", "refuse_unservable"]

MLA_SIZES: Mapping[str, int] = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
"""The only sizes for which vLLM has kernels of multi-head latent attention."""

_EXPORT = "export the model again"
_REWRITE = "export the model again, or write config.json with Architecture.to_hf()"
_NEEDED: Mapping[str, tuple[Any, str]] = {
    "model_type": (MODEL_TYPE, "vLLM reads the sizes by the model's type"),
    "topk_method": ("noaux_tc", "vLLM drops the experts' biases (KeyError when it loads them)"),
    "scoring_func": ("sigmoid", "vLLM scores experts by softmax, so that others are chosen"),
}
"""Keys that vLLM needs and transformers does not write: value, what happens without it."""

_LEFTOVERS: Mapping[str, str] = {
    "*.tmp": "a write that was cut short",
    ".incomplete": "the mark of an export that did not end",
    "*.distcp": "a Megatron or torch checkpoint",
    ".metadata": "a Megatron or torch checkpoint",
    "global_step*": "a DeepSpeed checkpoint",
    "optimizer*": "an optimizer's state",
    "scheduler*": "a scheduler's state",
    "rng_state*": "a trainer's state",
    "trainer_state.json": "a trainer's state",
    "training_args.bin": "a trainer's state",
    "checkpoint-*": "a trainer's checkpoint",
    "iter_*": "a Megatron checkpoint",
    "latest*": "a pointer to a trainer's checkpoint",
    "zero_to_fp32.py": "a script of DeepSpeed",
    "adapter_*": "a LoRA adapter, which transformers would load over the model",
    "*.bin": "weights in pickle files, which can run code",
    "*.pt": "pickle files, which can run code",
    "*.pth": "pickle files, which can run code",
    "events.out.tfevents.*": "logs",
}
"""What training leaves in a directory, by pattern."""


@dataclass(frozen=True, slots=True)
class _Weights:
    """The tensors of a directory and what config.json says of them."""

    directory: Path
    content: Mapping[str, Any]
    arch: Architecture
    reader: HFReader


def check_hf(directory: Path) -> list[Finding]:
    """All findings, those that block first.

    Reads headers, scales, biases, norms and what MTP repeats: about 6 GB of DeepSeek-V3.

    Raises:
        ValueError: There is no such directory.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory; expected an exported model")
    findings = [*_leftovers(directory), *_check_model(directory)]
    return sorted(findings, key=lambda finding: not finding.blocks)


def check_export(directory: Path) -> list[str]:
    """Lines with which an export ends: every finding, and whether vLLM can serve the directory.

    Raises nothing for what is found: the model is written and stays.
    """
    findings = check_hf(directory)
    blocked = any(finding.blocks for finding in findings)
    verdict = "not servable as it is" if blocked else "servable"
    return [*(f"serving: {finding}" for finding in findings), f"{directory}: {verdict}"]


def refuse_unservable(directory: Path) -> list[Finding]:
    """The findings that do not block.

    Raises:
        ValueError: There are others; each is listed.
    """
    findings = check_hf(directory)
    if blocking := [str(finding) for finding in findings if finding.blocks]:
        raise ValueError(f"{directory} cannot be served:\n  " + "\n  ".join(blocking))
    return findings


def _check_model(directory: Path) -> Iterator[Finding]:
    try:
        content = read_config_json(directory)
    except ValueError as error:
        yield Finding("config.json", str(error), _EXPORT)
        return
    if reason := another_model(content):
        yield Finding("config.json", reason, "give the directory of such a model")
        return
    yield from _check_keys(content)
    yield from check_tokenizer(directory, content)
    try:
        arch = Architecture.from_hf(content)
    except ValueError as error:
        yield Finding("config.json", str(error), _REWRITE)
        return
    yield from _check_sizes(arch, content)
    try:
        weights = _Weights(directory, content, arch, HFReader(directory))
    except ValueError as error:
        yield Finding("weights", str(error), "nothing else of the weights was checked")
        return
    for check in _WEIGHT_CHECKS:
        yield from check(weights)


def _check_keys(content: Mapping[str, Any]) -> Iterator[Finding]:
    if not content.get("architectures"):
        what = "architectures is missing, by which vLLM finds the model's class"
        yield Finding("config.json", what, _REWRITE)
    for key, (wanted, otherwise) in _NEEDED.items():
        if key not in content:
            yield Finding("config.json", f"{key} is missing: {otherwise}", _set(key, wanted))
        elif key == "model_type" and content[key] != wanted:
            what = f"{key} is {content[key]!r}: vLLM needs to know this type ({wanted!r} is known)"
            yield Finding("config.json", what, "see whether vLLM lists it", blocks=False)
        elif content[key] != wanted:
            what = f"{key} is {content[key]!r}: {otherwise}"
            yield Finding("config.json", what, _set(key, wanted))
    if "num_nextn_predict_layers" not in content:
        what = "num_nextn_predict_layers is missing, the only key where vLLM looks for MTP layers"
        yield Finding("config.json", what, "set it to the number of MTP layers, or to 0")


def _set(key: str, value: Any) -> str:
    return f'set "{key}": "{value}" in config.json'


def _check_sizes(arch: Architecture, content: Mapping[str, Any]) -> Iterator[Finding]:
    for key, wanted in MLA_SIZES.items():
        if (got := getattr(arch, key)) != wanted:
            what = f"{key} is {got}, and vLLM's kernels of latent attention know only {wanted}"
            way_out = "serve it with VLLM_MLA_DISABLE=1, or make a model of that size"
            yield Finding("config.json", what, way_out, blocks=False)
    if arch.yarn is None:
        what = "there is no YaRN in rope_scaling; vLLM has turned plain rope the wrong way round"
        yield Finding("config.json", what, "compare tokens with transformers first", blocks=False)
        return
    yield from _check_yarn(arch.yarn)
    given = content.get("rope_scaling") or content.get("rope_parameters") or {}
    if nulls := sorted(key for key, value in given.items() if value is None):
        what = f"{', '.join(nulls)} null: vLLM takes that for a number and fails"
        yield Finding("rope_scaling", what, "leave out what has no value")
    longest = arch.yarn.factor * arch.yarn.original_max_position_embeddings
    if longest != arch.max_position_embeddings:
        what = (
            f"YaRN stretches {arch.yarn.original_max_position_embeddings} positions by "
            f"{arch.yarn.factor:g} to {longest:g}, but max_position_embeddings is "
            f"{arch.max_position_embeddings}"
        )
        yield Finding("config.json", what, "give vLLM a --max-model-len", blocks=False)


def _check_yarn(yarn: Yarn) -> Iterator[Finding]:
    """vLLM's rotary embedding of DeepSeek knows fewer keys than transformers', and other defaults.

    See DeepseekScalingRotaryEmbedding and get_rope in vLLM 0.32.
    """
    mscale = 1.0 if yarn.mscale is None else yarn.mscale
    factor = yarn.get_mscale(mscale) / yarn.get_mscale(yarn.mscale_all_dim or 0.0)
    if not math.isclose(factor, yarn.applied_factor, rel_tol=1e-6):
        what = (
            f"vLLM multiplies the rotary embedding by {factor:.4f} where training does by "
            f"{yarn.applied_factor:.4f}: it reads mscale and mscale_all_dim only"
        )
        way_out = "write mscale and mscale_all_dim, both above zero, of the same effect"
        yield Finding("rope_scaling", what, way_out)
    if yarn.attention_factor == 1.0 and yarn.mscale_all_dim:
        what = "attention_factor 1.0 makes vLLM leave mscale_all_dim out of the attention's scale"
        yield Finding("rope_scaling", what, "remove attention_factor")
    if not yarn.truncate:
        what = "truncate is false, which vLLM does not know: it rounds the bounds of YaRN"
        yield Finding("rope_scaling", what, "compare tokens with transformers first", blocks=False)


def _check_names(weights: _Weights) -> Iterator[Finding]:
    try:
        weights.reader.check_against(weights.arch)
    except ValueError as error:
        yield Finding("weights", str(error), "vLLM would load another model, or none")
        return
    if differing := weights.reader.differing_copies(weights.arch):
        what = listed("copies differ", differing)
        yield Finding("weights", f"{what}: MTP would guess by other tokens", _EXPORT)
    stored = set(weights.reader.names())
    if missing := [name for name in exported_copies(weights.arch) if name not in stored]:
        what = listed("tensors that the MTP layer repeats are missing", missing)
        way_out = f"{_EXPORT}; without MTP, set num_nextn_predict_layers to 0"
        # vLLM 0.32 takes the model's own, but its embedding only without pipeline stages.
        yield Finding("weights", f"{what}: MTP guesses from noise in many vLLM setups", way_out)


def _check_types(weights: _Weights) -> Iterator[Finding]:
    reader = weights.reader
    stored = set(reader.names())
    params = [(name, p) for p in expand(weights.arch) for name in p.hf if name in stored]
    if rounded := [n for n, p in params if p.is_buffer and reader.dtype(n) != torch.float32]:
        what = listed("biases of experts are not in fp32, so they are rounded", rounded)
        yield Finding("weights", what, "export them in fp32", blocks=False)
    kinds = {reader.dtype(n) for n, p in params if not p.is_buffer and not reader.is_fp8(n)}
    said = weights.content.get("dtype") or weights.content.get("torch_dtype")
    if [str(kind).removeprefix("torch.") for kind in kinds] != [said]:
        names = ", ".join(sorted(map(str, kinds)))
        what = f"torch_dtype is {said!r}, the weights are in {names}"
        yield Finding("config.json", what, "vLLM casts them; --dtype says to what", blocks=False)
    yield from _check_fp8(weights, [name for name, p in params if p.quantised])


def _check_fp8(weights: _Weights, quantisable: Iterable[str]) -> Iterator[Finding]:
    reader = weights.reader
    fp8 = {name for name in reader.names() if reader.is_fp8(name)}
    claimed = weights.content.get("quantization_config") is not None
    if fp8 and not claimed:
        what = f"{len(fp8)} tensors are in FP8 but there is no quantization_config"
        yield Finding("config.json", f"{what}: vLLM would read them without scales", _REWRITE)
    if not fp8 and claimed:
        what = "quantization_config promises FP8 and no tensor is in FP8"
        yield Finding("config.json", what, "remove the key, or export in FP8")
    if fp8 and (plain := [name for name in quantisable if name not in fp8]):
        what = listed("tensors are not in FP8 as their like are", plain)
        yield Finding("weights", f"{what}: vLLM waits for their scales", "export all in FP8")
    wanted = set(quantisable)
    if surplus := sorted(fp8 - wanted):
        what = listed("tensors are in FP8 that DeepSeek's format leaves unquantised", surplus)
        yield Finding("weights", what, "export them in BF16")


def _check_numbers(weights: _Weights) -> Iterator[Finding]:
    """Small tensors in full; of a matrix in FP8 its scales. The large ones would take an hour."""
    reader = weights.reader
    broken_scales, not_finite = [], []
    for name in reader.names():
        if reader.is_fp8(name):
            scales = reader.read_fp8(name)[1]
            if not bool((scales.isfinite() & (scales > 0)).all()):
                broken_scales.append(name)
        elif len(reader.shape(name)) == 1 and not bool(reader.read(name).isfinite().all()):
            not_finite.append(name)
    if broken_scales:
        what = listed("tensors have a scale that is zero, negative or not finite", broken_scales)
        yield Finding("weights", what, _EXPORT)
    if not_finite:
        what = listed("tensors hold numbers that are not finite", not_finite)
        yield Finding("weights", what, "the training diverged: export an earlier checkpoint")


_WEIGHT_CHECKS: tuple[Callable[[_Weights], Iterator[Finding]], ...] = (
    _check_names,
    _check_types,
    _check_numbers,
)


def _leftovers(directory: Path) -> Iterator[Finding]:
    for pattern, meaning in _LEFTOVERS.items():
        for path in sorted(directory.glob(pattern)):
            what = f"{meaning}, no part of a model to serve"
            yield Finding(path.name, what, "move it away", blocks=False)
    known = "model-*.safetensors" if (directory / INDEX).exists() else SINGLE
    for path in sorted(directory.glob("*.safetensors")):
        if not path.match(known):
            what = "is not of this checkpoint, and vLLM reads every *.safetensors without an index"
            yield Finding(path.name, what, "move it away", blocks=known == SINGLE)
