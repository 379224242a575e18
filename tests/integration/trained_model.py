"""A small DeepSeek-V3 of sizes that vLLM serves, trained and exported by this package.

    python tests/integration/trained_model.py DIR

writes DIR/fp32, DIR/bf16 and DIR/fp8 (exports of the same model) and DIR/reference.json: what
transformers makes of three prompts in fp32.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from small_job import conversation, write_chats, write_job, write_model
from transformers import AutoTokenizer, DeepseekV3ForCausalLM

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.convert.fp8 import quantize
from megatron_dsv3.convert.hf_io import HFReader, write_hf
from megatron_dsv3.convert.mapping import by_hf_name

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
    exported = train(directory)
    write_others(exported, directory)
    (directory / "reference.json").write_text(json.dumps(reference(exported)))


def train(directory: Path) -> Path:
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
    subprocess.run(command, check=True, timeout=600)
    return directory / "fp32"


def write_others(exported: Path, directory: Path) -> None:
    """The same weights in BF16, and in FP8 where DeepSeek's checkpoints are."""
    arch, reader = Architecture.from_hf(exported), HFReader(exported)
    params = by_hf_name(arch)

    def stream(*, fp8: bool):
        for name in reader.names():
            param, tensor = params.get(name), reader.read(name)
            if param is not None and param.is_buffer:
                yield name, tensor
            elif fp8 and param is not None and param.quantised:
                yield from zip((name, f"{name}_scale_inv"), quantize(tensor), strict=True)
            else:
                yield name, tensor.bfloat16()

    for kind in ("bf16", "fp8"):
        config = arch.to_hf(fp8=kind == "fp8")
        write_hf(stream(fp8=kind == "fp8"), directory / kind, config=config, template=exported)


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
