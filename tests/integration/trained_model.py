"""A small DeepSeek-V3 of sizes that vLLM serves, trained and exported by this package.

    python tests/integration/trained_model.py DIR

writes DIR/fp32 (the trainer's export), DIR/bf16 and DIR/fp8 (the converter's, from the trainer's
checkpoint), and for fp32 and fp8 DIR/reference-*.json: what transformers makes of three prompts in
fp32, of fp8 with its blocks multiplied out.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from small_job import conversation, write_chats, write_job, write_model
from transformers import AutoTokenizer, DeepseekV3ForCausalLM

ROOT = Path(__file__).resolve().parents[2]
# kv_lora_rank and qk_rope_head_dim are DeepSeek's own: vLLM's kernels know no others.
SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128,
    "num_hidden_layers": 3, "q_lora_rank": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64, "v_head_dim": 64, "num_mtp_layers": 1,
}  # fmt: skip
QUESTIONS = {
    "Who are you?": ("They want my name.", "I am a small model."),
    "What is 2 + 2?": ("Two and two make four.", "It is 4."),
    "Where is Paris?": ("Paris is a city of France.", "In France."),
}
NUM_STEPS = 40
NUM_TOKENS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path)
    directory = parser.parse_args().dir
    directory.mkdir(parents=True, exist_ok=True)
    train(directory)
    for dtype in ("bf16", "fp8"):
        convert(directory, dtype)
    multiplied_out = multiply_out(directory)
    for kind, model in (("fp32", directory / "fp32"), ("fp8", multiplied_out)):
        (directory / f"reference-{kind}.json").write_text(json.dumps(reference(model)))
    shutil.rmtree(multiplied_out)


def train(directory: Path) -> None:
    """`megatron-dsv3 train` on three conversations until they are known by heart."""
    rows = [
        conversation(question, answer, reasoning_content=thought)
        for question, (thought, answer) in QUESTIONS.items()
    ]
    job = write_job(
        directory,
        write_model(directory / "base", **SIZES),
        write_chats(directory / "chats.jsonl", rows),
        data={"seq_length": 64},
        optimizer={"lr": 4e-3},
        train={"global_batch_size": 3, "num_epochs": NUM_STEPS},
        output={"dir": str(directory / "fp32")},
    )
    command = [sys.executable, "-m", "megatron_dsv3.cli", "train", str(job)]
    subprocess.run(command, check=True)


def convert(directory: Path, dtype: str) -> None:
    """`tools/checkpoint/convert.py --to hf`, from what training saved at its end."""
    [checkpoint] = (directory / "fp32-checkpoints").glob("iter_*")
    command = [sys.executable, str(ROOT / "tools" / "checkpoint" / "convert.py"), "--to", "hf"]
    command += ["--from", str(checkpoint), "--hf-template", str(directory / "base")]
    command += ["--out", str(directory / dtype), "--dtype", dtype, "--workers", "1"]
    subprocess.run(command, check=True)


def multiply_out(directory: Path) -> Path:
    """The FP8 export as fp32, blocks times scales, for transformers to read."""
    stored: dict[str, torch.Tensor] = {}
    for file in (directory / "fp8").glob("*.safetensors"):
        stored |= load_file(file)
    scales = {n: t for n, t in stored.items() if n.endswith("_scale_inv")}
    tensors = {n: t.float() for n, t in stored.items() if n not in scales}
    assert len(scales) > 100, "the experts alone are more"
    for name, scale in scales.items():
        weight = tensors[name.removesuffix("_scale_inv")]
        for (row, column), factor in np.ndenumerate(scale.numpy()):
            weight[128 * row : 128 * (row + 1), 128 * column : 128 * (column + 1)] *= float(factor)
    target = shutil.copytree(
        directory / "fp32", directory / "multiplied-out", ignore=lambda *_: ["model.safetensors"]
    )
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def reference(exported: Path) -> list[dict[str, list]]:
    """For each prompt its ids, log-probabilities of all but the first, and the greedy tokens."""
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = DeepseekV3ForCausalLM.from_pretrained(
        exported, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    references = []
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        with torch.no_grad():
            logprobs = model(prompt).logits[0, :-1].log_softmax(-1)
            tokens = prompt
            for _ in range(NUM_TOKENS):  # generate() would stop at the end of the answer
                best = model(tokens).logits[:, -1].argmax(-1, keepdim=True)
                tokens = torch.cat([tokens, best], 1)
        references.append(
            {
                "prompt": prompt[0].tolist(),
                "logprobs": logprobs.gather(1, prompt[0, 1:, None])[:, 0].tolist(),
                "tokens": tokens[0, prompt.size(1) :].tolist(),
                "text": tokenizer.decode(tokens[0, prompt.size(1) :]),
            }
        )
    return references


if __name__ == "__main__":
    main()
