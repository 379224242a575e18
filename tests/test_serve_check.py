"""Mistakes planted in a servable directory, each of which `serve check` names."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from small_job import TOKENIZER, write_model

from megatron_dsv3.commands import serve
from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.convert.fp8 import quantize
from megatron_dsv3.convert.mapping import by_hf_name
from megatron_dsv3.data.tokens import load_tokenizer
from megatron_dsv3.serve import tokenizer_check
from megatron_dsv3.serve.finding import Finding
from megatron_dsv3.serve.hf_check import check_export, check_hf, refuse_unservable

WEIGHTS = "model.safetensors"
MTP = "model.layers.2."
YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 16, "beta_fast": 32,
    "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
SCALED = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def servable(tmp_path_factory) -> Path:
    """As an export writes it: every finding below comes from the mistake that was planted."""
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
    directory = write_model(tmp_path_factory.mktemp("servable"), **sizes)
    _write(directory, Architecture.from_hf(directory).to_hf(dtype="float32"))
    return directory


@pytest.fixture(scope="module")
def servable_fp8(servable, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("servable_fp8")
    shutil.copytree(servable, directory, dirs_exist_ok=True)
    arch = Architecture.from_hf(directory)
    params, tensors = by_hf_name(arch), load_file(directory / WEIGHTS)
    for name in list(tensors):
        if name in params and params[name].quantised:
            tensors[name], tensors[f"{name}_scale_inv"] = quantize(tensors[name])
    save_file(tensors, directory / WEIGHTS)
    _write(directory, arch.to_hf(dtype="float32", fp8=True))
    return directory


@pytest.fixture(autouse=True)
def _tokenizers_are_loaded_once(monkeypatch):
    """Half a second each; a file that a test changed is no link any more, and is loaded."""

    def load(directory):
        files = [directory / name for name in TOKENIZER]
        return (
            _loaded(*map(Path.resolve, files))
            if all(map(Path.is_symlink, files))
            else (load_tokenizer(directory))
        )

    monkeypatch.setattr(tokenizer_check, "load_tokenizer", load)


@functools.cache
def _loaded(tokenizer_json: Path, _: Path):
    return load_tokenizer(tokenizer_json.parent)


@pytest.fixture
def copy(servable, tmp_path) -> Path:
    """Linked, so that a test writes anew what it changes and nothing else."""
    return _linked(servable, tmp_path / "copy")


@pytest.fixture
def copy_fp8(servable_fp8, tmp_path) -> Path:
    return _linked(servable_fp8, tmp_path / "copy_fp8")


def _linked(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
    return target


def _write(directory: Path, content: dict[str, Any], file: str = "config.json") -> None:
    (directory / file).unlink(missing_ok=True)
    (directory / file).write_text(json.dumps(content))


def _read(directory: Path, file: str = "config.json") -> dict[str, Any]:
    return json.loads((directory / file).read_text())


def _change(directory: Path, **keys: Any) -> None:
    """Keys of config.json; None removes one."""
    content = {key: value for key, value in (_read(directory) | keys).items() if value is not None}
    _write(directory, content)


def _change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    (directory / WEIGHTS).unlink()
    save_file(tensors, directory / WEIGHTS)


def _change_template(directory: Path, change: Callable[[str], str | None]) -> None:
    content = _read(directory, "tokenizer_config.json")
    content["chat_template"] = change(content["chat_template"])
    _write(directory, content, "tokenizer_config.json")


def _only(findings: list[Finding], *, blocks: bool = True) -> str:
    assert [finding.blocks for finding in findings] == [blocks], [str(f) for f in findings]
    return str(findings[0])


def test_an_export_gives_no_finding(servable):
    assert check_hf(servable) == []


def test_an_export_in_fp8_gives_no_finding(servable_fp8):
    assert check_hf(servable_fp8) == []


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("topk_method", None, "topk_method is missing: vLLM drops the experts' biases"),
        ("scoring_func", None, "scoring_func is missing: vLLM scores experts by softmax"),
        ("model_type", None, "model_type is missing"),
        ("architectures", None, "architectures is missing"),
        ("num_nextn_predict_layers", None, "num_nextn_predict_layers is missing"),
        ("bos_token_id", 5, "bos_token_id is 5, the tokenizer's is 0"),
        ("eos_token_id", [5, 6], r"eos_token_id is \[5, 6\], the tokenizer's is 1"),
        ("quantization_config", {}, "is not DeepSeek's FP8"),
        ("n_group", "eight", "n_group must be a positive integer"),
    ],
)
def test_a_wrong_key_is_named(copy, key, value, named):
    _change(copy, **{key: value})
    with pytest.raises(ValueError, match=named):
        refuse_unservable(copy)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"model_type": "kimi_k2"}, "model_type is 'kimi_k2'"),
        ({"rope_scaling": None, "max_position_embeddings": 99}, "there is no YaRN"),
        ({"max_position_embeddings": 99}, "stretches 16 positions by 40 to 640, but .* is 99"),
        ({"torch_dtype": "bfloat16"}, "torch_dtype is 'bfloat16', the weights are in torch.float"),
        ({"torch_dtype": ["float32"]}, r"torch_dtype is \['float32'\], the weights are in torch"),
        (
            {"rope_scaling": YARN | {"truncate": False}},
            "truncate is false, which vLLM does",
        ),
    ],
)
def test_what_does_not_block_is_a_note(copy, keys, named):
    _change(copy, **keys)
    with pytest.raises(AssertionError, match=named):
        raise AssertionError(_only(check_hf(copy), blocks=False))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        # ln 40 / 10 = 0.36889: what YaRN stretches cos and sin by on its own.
        ({"mscale": None}, r"mscale null: vLLM takes that for a number and fails"),
        ({"attention_factor": 1.3}, "by 1.0000 where training does by 1.3000"),
        ({"attention_factor": 1.0}, "leave mscale_all_dim out of the attention's scale"),
        ({"mscale_all_dim": 0.0, "mscale": 0.5}, "by 1.1844 where training does by 1.3689"),
    ],
)
def test_yarn_that_vllm_reads_in_another_way_is_named(copy, keys, named):
    _change(copy, rope_scaling=YARN | keys)
    with pytest.raises(ValueError, match=named):
        refuse_unservable(copy)


def test_yarn_that_both_read_alike_gives_no_finding(copy):
    _change(copy, rope_scaling={k: v for k, v in YARN.items() if not k.startswith("mscale")})
    assert check_hf(copy) == []


def test_sizes_without_kernels_are_noted(tmp_path):
    directory = write_model(tmp_path / "small")
    _write(directory, Architecture.from_hf(directory).to_hf(dtype="float32"))
    found = [str(finding) for finding in refuse_unservable(directory)]
    assert [text.split(",")[0] for text in found] == [
        "config.json: kv_lora_rank is 16",
        "config.json: qk_rope_head_dim is 8",
    ]


def test_a_missing_copy_of_mtp_is_named(copy):
    name = f"{MTP}shared_head.head.weight"
    _change_tensors(copy, lambda tensors: tensors.pop(name))
    assert f"MTP layer repeats are missing: {name}" in _only(check_hf(copy))


def test_a_copy_that_differs_is_named(copy):
    name = f"{MTP}embed_tokens.weight"
    _change_tensors(copy, lambda tensors: tensors[name][7].add_(1))
    assert f"1 copies differ: {name} from model.embed_tokens.weight" in _only(check_hf(copy))


def test_missing_surplus_and_wrongly_shaped_tensors_are_named(copy):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.extra"] = torch.ones(2)
        tensors["lm_head.weight"] = torch.ones(3, 32)

    _change_tensors(copy, change)
    text = _only(check_hf(copy))
    assert "1 missing: model.norm.weight; 1 surplus: model.extra" in text
    assert "lm_head.weight expected [129280, 32] got [3, 32]" in text


def test_numbers_that_are_not_finite_are_named(copy):
    name = f"{MTP}enorm.weight"
    _change_tensors(copy, lambda tensors: tensors[name][3].fill_(torch.nan))
    assert f"not finite: {name}" in _only(check_hf(copy))


def test_rounded_biases_are_noted(copy):
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    _change_tensors(copy, lambda t: t.update({name: t[name].bfloat16()}))
    assert f"biases of experts are not in fp32, so they are rounded: {name}" in _only(
        check_hf(copy), blocks=False
    )


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
def test_a_broken_scale_is_named(copy_fp8, value):
    _change_tensors(copy_fp8, lambda tensors: tensors[f"{SCALED}_scale_inv"].fill_(value))
    assert f"zero, negative or not finite: {SCALED}" in _only(check_hf(copy_fp8))


def test_a_missing_scale_is_named(copy_fp8):
    _change_tensors(copy_fp8, lambda tensors: tensors.pop(f"{SCALED}_scale_inv"))
    assert f"have no _scale_inv: {SCALED}" in _only(check_hf(copy_fp8))


def test_fp8_without_its_key_is_named(copy_fp8):
    _change(copy_fp8, quantization_config=None)
    assert "tensors are in FP8 but there is no quantization_config" in _only(check_hf(copy_fp8))


def test_the_key_of_fp8_without_fp8_is_named(copy, servable_fp8):
    _change(copy, quantization_config=_read(servable_fp8)["quantization_config"])
    assert "promises FP8 and no tensor is in FP8" in _only(check_hf(copy))


def test_a_matrix_left_out_of_fp8_is_named(copy_fp8):
    def change(tensors):
        tensors[SCALED] = torch.zeros(tensors[SCALED].shape)
        del tensors[f"{SCALED}_scale_inv"]

    _change_tensors(copy_fp8, change)
    assert f"not in FP8 as their like are: {SCALED}" in _only(check_hf(copy_fp8))


def test_fp8_where_the_format_has_none_is_named(copy_fp8):
    name = "lm_head.weight"

    def change(tensors):
        tensors[name], tensors[f"{name}_scale_inv"] = quantize(tensors[name])
        del tensors[f"{MTP}shared_head.head.weight"]

    _change_tensors(copy_fp8, change)
    assert any(f"unquantised: {name}" in str(finding) for finding in check_hf(copy_fp8))


# ---- Tokenizer and chat template ----------------------------------------------------------------


def test_a_missing_tokenizer_is_named(copy):
    (copy / "tokenizer.json").unlink()
    assert "tokenizer.json: not found" in _only(check_hf(copy))


def test_a_vocabulary_too_small_for_the_tokenizer_is_named(copy):
    _change(copy, vocab_size=1000)
    assert any("tokens, more than config.json's vocab" in str(found) for found in check_hf(copy))


def test_a_tokenizer_without_the_tags_of_reasoning_is_noted(copy):
    for file in TOKENIZER:
        content = (copy / file).read_text().replace("</think>", "</thought>")
        (copy / file).unlink()
        (copy / file).write_text(content)
    assert "</think> is no token of its own" in "".join(map(str, check_hf(copy)))


def test_a_tokenizer_without_the_tokens_of_tool_calls_is_noted(copy):
    for file in TOKENIZER:
        content = (copy / file).read_text().replace("<｜tool▁calls▁end｜>", "<｜no▁calls▁end｜>")
        (copy / file).unlink()
        (copy / file).write_text(content)
    [note] = [str(found) for found in check_hf(copy) if "no token of its own" in str(found)]
    assert "<｜tool▁calls▁end｜>" in note
    assert note.endswith("serve with --tool-parser none")


def test_a_missing_template_is_named(copy):
    _change_template(copy, lambda _: None)
    assert "/v1/chat/completions answers with an error" in _only(check_hf(copy))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (
            "{{'<｜Assistant｜>'}}{% endif %}",
            "{% endif %}",
            "a prompt should end in <｜Assistant｜>",
        ),
        (
            "{{'<｜Assistant｜>'}}{% endif %}",
            "{{'<｜Assistant｜>Well'}}{% endif %}",
            "ends in .*Well",
        ),
        ("{{ bos_token }}", "", "a prompt should begin with one"),
        ("{{ bos_token }}", "{{ bos_token + bos_token }}", "a prompt should begin with one"),
        ("split('</think>')[-1]", "split('</think>')[0]", "an earlier answer and .* are not in"),
        ("content + '<｜end▁of▁sentence｜>'", "content", "an earlier answer and .* are not in"),
        ("{{ bos_token }}", "{{ bos_token }}{% if", "fails on a plain conversation .Template"),
    ],
)
def test_a_template_that_breaks_the_format_is_named(copy, old, new, named):
    _change_template(copy, lambda template: template.replace(old, new))
    with pytest.raises(ValueError, match=named):
        refuse_unservable(copy)


def test_a_template_that_keeps_earlier_reasoning_is_noted(copy):
    _change_template(copy, lambda text: text.replace("'</think>' in content", "false"))
    assert "keeps the <think> of earlier turns" in _only(check_hf(copy), blocks=False)


def test_a_prompt_may_open_the_reasoning(copy):
    prompt = "{{'<｜Assistant｜>'}}{% endif %}"
    opened = prompt.replace("'}}", "<think>\\n'}}")
    _change_template(copy, lambda template: template.replace(prompt, opened))
    assert opened in _read(copy, "tokenizer_config.json")["chat_template"]
    assert check_hf(copy) == []


def test_a_format_that_nobody_trains_in_is_noted(copy):
    _change_template(copy, lambda t: t.replace("{{'<｜User｜>' +", "{{'User: ' +"))
    assert "writes none of the formats deepseek_v3" in _only(check_hf(copy), blocks=False)


def test_a_generation_config_that_ends_elsewhere_is_named(copy):
    _write(copy, {"eos_token_id": 2}, "generation_config.json")
    assert "generation_config.json: eos_token_id is 2" in _only(check_hf(copy))


@pytest.mark.parametrize("content", ["[]", '"text"', "{"])
def test_a_generation_config_that_is_none_is_named(copy, content):
    (copy / "generation_config.json").write_text(content)
    assert "generation_config.json: " in _only(check_hf(copy))


# ---- The directory ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("optimizer.pt", "training_args.bin", "__0_0.distcp", "a.tmp", "checkpoint-100"),
        *("iter_0000100", "latest_checkpointed_iteration.txt", "adapter_config.json"),
    ],
)
def test_leftovers_of_training_are_noted(copy, name):
    (copy / name).touch()
    findings = check_hf(copy)
    assert findings
    assert not [f for f in findings if f.blocks or not str(f).startswith(f"{name}: ")]


def test_a_second_file_of_weights_is_named(copy):
    save_file({"lm_head.weight": torch.ones(1)}, copy / "consolidated.safetensors")
    assert "consolidated.safetensors: is not of this checkpoint" in _only(check_hf(copy))


@pytest.mark.parametrize("content", ["{", "[]", '{"architectures": ["LlamaForCausalLM"]}'])
def test_another_config_is_named(copy, content):
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(content)
    assert "config.json" in _only(check_hf(copy))


def test_all_problems_come_in_one_error(copy):
    _change(copy, topk_method=None, eos_token_id=5)
    _change_tensors(copy, lambda tensors: tensors.pop(f"{MTP}embed_tokens.weight"))
    with pytest.raises(ValueError, match="cannot be served") as raised:
        serve.check(copy, Console())
    assert str(raised.value).count("\n") == 3


def test_no_directory_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no such directory; expected an exported model"):
        check_hf(tmp_path / "none")


def test_an_export_ends_with_the_check(servable, copy):
    assert check_export(servable) == [f"{servable}: servable"]
    _change(copy, topk_method=None, torch_dtype="bfloat16")
    *found, verdict = check_export(copy)
    assert [line.split(" is ")[0] for line in found] == [
        "serving: config.json: topk_method",
        "serving: config.json: torch_dtype",
    ]
    assert verdict == f"{copy}: not servable as it is"


def test_a_servable_directory_is_told(servable, capsys):
    serve.check(servable, Console())
    assert "servable" in capsys.readouterr().out
