"""Exports of a trained model in vLLM on CPUs, against transformers.

With what `serve check` says of three planted mistakes, and what vLLM makes of each.
"""

import json
import os
import signal
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from environment import (
    ON_CPU,
    ROOT,
    SERVING,
    free_port,
    read_until,
    run_within,
    started,
    vllm_python,
)
from safetensors.torch import load_file, save_file

from megatron_dsv3.serve.client import ask
from megatron_dsv3.serve.hf_check import check_hf

OFFLINE_SECONDS = 120
READY_SECONDS = 180
WORKER = Path(__file__).with_name("vllm_worker.py")
FP32_TOLERANCE = 1e-5
# bf16 measured 0.37: of log-probabilities down to -17, whose logits bf16 spaces 0.1 and more apart.
LOOSE = {"bf16": 0.5, "fp8": 1.0}
MTP = "model.layers.3."
MTP_ON_CPU = '{"method": "mtp", "num_speculative_tokens": 1, "attention_backend": "CPU_MLA"}'


# Without AMX tiles vLLM has no kernel for FP8 blocks on CPUs, and torch multiplies them instead.
HAS_AMX = "amx_tile" in Path("/proc/cpuinfo").read_text()


@pytest.fixture(scope="module")
def python() -> str:
    return vllm_python()


@pytest.fixture(scope="module")
def reference(models) -> list[dict[str, Any]]:
    return json.loads((models / "reference-fp32.json").read_text())


@pytest.fixture
def offline(python, models, tmp_path):
    """Runs a directory in vLLM; gives the answers, or what it printed where it failed."""

    def run(
        hf_dir: Path, dtype: str = "float32", *, mtp: bool = False, fp8_in_torch: bool = False
    ) -> dict[str, Any] | str:
        out, prompts = tmp_path / "out.json", models / "reference-fp32.json"
        command = [python, str(WORKER), str(hf_dir), str(prompts), str(out), "--dtype", dtype]
        command += ["--mtp"] * mtp + ["--fp8-in-torch"] * fp8_in_torch
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | SERVING
        # One process: half of the time went to a second one's imports.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        done = run_within(OFFLINE_SECONDS, command, env=environment)
        if done.returncode:
            return done.stdout + done.stderr
        return json.loads(out.read_text())

    return run


def _answers(result: dict[str, Any] | str) -> list[dict[str, Any]]:
    assert isinstance(result, dict), result[-3000:]
    return result["answers"]


def _largest_difference(answers, reference) -> float:
    return max(
        abs(ours - theirs)
        for answer, expected in zip(answers, reference, strict=True)
        for ours, theirs in zip(answer["logprobs"], expected["logprobs"], strict=True)
    )


def _same_tokens(answers, reference) -> list[int]:
    """How many tokens of each answer are the reference's, up to the first that is not."""
    counts = []
    for answer, expected in zip(answers, reference, strict=True):
        pairs = zip(answer["tokens"], expected["tokens"], strict=True)
        counts.append(
            next((i for i, (a, b) in enumerate(pairs) if a != b), len(expected["tokens"]))
        )
    return counts


def test_the_training_taught_the_answers(reference):
    assert reference[0]["text"].startswith("<think>\nThey want my name.\n</think>\n\nI am a small")
    assert [len(expected["tokens"]) for expected in reference] == [24, 24, 24]


@pytest.mark.parametrize("mtp", [False, True])
def test_fp32_gives_the_tokens_of_transformers(offline, models, reference, mtp):
    result = offline(models / "fp32", mtp=mtp)
    answers = _answers(result)
    assert _same_tokens(answers, reference) == [24, 24, 24]
    assert _largest_difference(answers, reference) < FP32_TOLERANCE
    if mtp:
        accepted, drafts = (result["counters"][f"{name}_tokens"] for name in ("accepted", "draft"))
        assert 0.2 * drafts < accepted <= drafts
        print(f"MTP: {accepted} of {drafts} accepted")  # noqa: T201 - shown by pytest -s


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_rounded_exports_are_close(offline, models, reference, kind):
    in_torch = kind == "fp8" and not HAS_AMX
    answers = _answers(offline(models / kind, "bfloat16", fp8_in_torch=in_torch))
    difference = _largest_difference(answers, reference)
    print(f"{kind}: {difference:.3f}, {_same_tokens(answers, reference)} tokens")  # noqa: T201
    assert difference < LOOSE[kind]
    assert min(_same_tokens(answers, reference)) >= 8, "up to the end of the reasoning"


@pytest.mark.parametrize("mtp", [False, True])
def test_fp8_blocks_and_scales_are_read_as_transformers_reads_them_multiplied_out(
    offline, models, mtp
):
    expected = json.loads((models / "reference-fp8.json").read_text())
    result = offline(models / "fp8", mtp=mtp, fp8_in_torch=True)
    answers = _answers(result)
    assert _same_tokens(answers, expected) == [24, 24, 24]
    assert _largest_difference(answers, expected) < FP32_TOLERANCE
    if mtp:
        assert result["counters"]["accepted_tokens"] > 0.2 * result["counters"]["draft_tokens"]


@pytest.mark.skipif(HAS_AMX, reason="vLLM's own kernels multiply FP8 blocks on this CPU")
def test_without_amx_tiles_vllm_itself_refuses_fp8_blocks(offline, models):
    output = offline(models / "fp8", "bfloat16")
    assert isinstance(output, str), "vLLM served it: the stand-in is needed no more"
    assert "requires AMX tile support" in output


# ---- Planted mistakes ---------------------------------------------------------------------------


def _planted(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
    return target


def _blocking(directory: Path) -> str:
    return "\n".join(str(finding) for finding in check_hf(directory) if finding.blocks)


def test_without_topk_method_vllm_fails_as_the_check_says(offline, models, tmp_path):
    directory = _planted(models / "fp32", tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    del config["topk_method"]
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps(config))
    assert "topk_method is missing" in _blocking(directory)
    output = offline(directory)
    assert isinstance(output, str), "vLLM served it"
    assert "KeyError" in output
    assert "e_score_correction_bias" in output


def _without(directory: Path, *names: str) -> None:
    tensors = load_file(directory / "model.safetensors")
    for name in names:
        del tensors[name]
    (directory / "model.safetensors").unlink()
    save_file(tensors, directory / "model.safetensors")


def test_without_its_copies_mtp_lives_on_the_models_own_in_one_stage(offline, models, tmp_path):
    """Of this version of vLLM; older ones, and pipeline stages, have nothing else."""
    directory = _planted(models / "fp32", tmp_path / "model")
    _without(directory, f"{MTP}embed_tokens.weight", f"{MTP}shared_head.head.weight")
    assert f"MTP layer repeats are missing: {MTP}embed_tokens.weight" in _blocking(directory)
    result = offline(directory, mtp=True)
    assert isinstance(result, dict), result[-3000:]
    assert result["counters"]["accepted_tokens"] > 0


def test_without_a_tensor_of_its_own_mtp_fails_or_guesses_nothing(offline, models, tmp_path):
    directory = _planted(models / "fp32", tmp_path / "model")
    _without(directory, f"{MTP}eh_proj.weight")
    assert f"1 missing: {MTP}eh_proj.weight" in _blocking(directory)
    result = offline(directory, mtp=True)
    if isinstance(result, dict):
        assert result["counters"]["accepted_tokens"] < 0.2 * result["counters"]["draft_tokens"]
    else:
        assert "eh_proj" in result


def test_with_a_broken_scale_vllm_answers_nonsense(offline, models, reference, tmp_path):
    directory = _planted(models / "fp8", tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight"
    tensors[f"{name}_scale_inv"].fill_(torch.nan)
    (directory / "model.safetensors").unlink()
    save_file(tensors, directory / "model.safetensors")
    assert f"zero, negative or not finite: {name}" in _blocking(directory)
    result = offline(directory, "bfloat16", fp8_in_torch=not HAS_AMX)
    if isinstance(result, str):
        assert "nan" in result.lower(), result[-3000:]
    else:  # it does not even notice
        assert max(_same_tokens(result["answers"], reference)) < 8


# ---- Over HTTP ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(python, models) -> Iterator[str]:
    """`megatron-dsv3 serve run` with MTP; what it printed is checked when it has ended."""
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "megatron_dsv3.cli", "serve", "run"]
    command += [str(models / "fp32"), "--python", python, "--port", str(port), "--name", "small"]
    command += ["--max-model-len=128", f"--ready-seconds={READY_SECONDS}", *ON_CPU]
    command += ["--speculative", MTP_ON_CPU]
    environment = os.environ | SERVING | {"VLLM_API_KEY": "secret", "PYTHONPATH": str(ROOT)}
    with started(command, env=environment) as process:
        lines = read_until(process, "curl ", 2 * READY_SECONDS)
        assert "curl " in "".join(lines[-1:]), "".join(lines)[-3000:]
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=60)[0]
        assert process.returncode == 0, rest[-2000:]
        assert "SIGTERM: ending the server" in rest
        assert any(line.startswith("ready after ") for line in lines)
        assert any("tokens/s" in line for line in lines)


def test_reasoning_and_answer_come_apart(server):
    answer = ask(server, question="What is 2 + 2?", max_tokens=40, api_key="secret")
    assert answer.reasoning.strip() == "Two and two make four."
    assert answer.content.strip() == "It is 4."
    assert answer.finish_reason == "stop", "the end of the answer is that of the training"


def test_completions_are_the_tokens_of_transformers(server, reference):
    for expected in reference:
        request = {
            "model": "small",
            "prompt": expected["prompt"],
            "max_tokens": len(expected["tokens"]),
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
        body = json.dumps(request).encode()
        request = urllib.request.Request(f"{server}/v1/completions", body, headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            [choice] = json.load(response)["choices"]
        assert choice["token_ids"] == expected["tokens"]


def test_the_key_is_asked_for(server):
    with pytest.raises(ValueError, match=r"401.*give its key with --api-key"):
        ask(server)
