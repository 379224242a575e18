"""transformers' DeepseekV3 with random weights, norms and biases, as an outside reference.

`save` writes a directory in the published names, MTP layers and their copies included, which
transformers itself does not save.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0,
    "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_shared_experts": 1, "n_routed_experts": 16, "routed_scaling_factor": 2.5,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "qk_nope_head_dim": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4,
    "first_k_dense_replace": 1, "norm_topk_prob": True, "max_position_embeddings": 640,
    "rope_parameters": YARN, "rms_norm_eps": 1e-6, "initializer_range": 0.1,
    "num_mtp_layers": 1, "tie_word_embeddings": False,
}  # fmt: skip
REAL_HEADS: dict[str, Any] = {
    # Of a size that the kernels of a GPU take.
    "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 256, "kv_lora_rank": 128,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "rope_parameters": {**YARN, "original_max_position_embeddings": 64},
}  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """The main model and its MTP layers, fp32, eager attention."""

    model: DeepseekV3ForCausalLM
    mtp: nn.ModuleList

    @property
    def num_layers(self) -> int:
        return self.model.config.num_hidden_layers

    def logits(self, tokens: Tensor) -> list[Tensor]:
        """[batch, seq, vocab] of the main prediction and of every MTP depth."""
        base = self.model.model
        hidden = base(tokens).last_hidden_state
        outputs = [self.model.lm_head(hidden)]
        length = tokens.size(1)
        positions = torch.arange(length, device=tokens.device).expand_as(tokens)
        rotary = base.rotary_emb(hidden, positions)
        mask = torch.full((length, length), float("-inf"), device=tokens.device).triu(1)[None, None]
        for layer in self.mtp:
            tokens = torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], 1)
            hidden = layer(base.embed_tokens(tokens), hidden, rotary, mask, positions, None)
            outputs.append(self.model.lm_head(hidden))
        return outputs

    def tensors(self) -> dict[str, Tensor]:
        """All weights in the names of the published checkpoint."""
        tensors = _published(self.model.state_dict())
        if self.model.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        for depth, layer in enumerate(self.mtp):
            prefix = f"model.layers.{self.num_layers + depth}."
            state = {prefix + _mtp_name(k): v for k, v in layer.state_dict().items()}
            tensors |= _published(state)
            tensors[prefix + "embed_tokens.weight"] = self.model.model.embed_tokens.weight.data
            tensors[prefix + "shared_head.head.weight"] = self.model.lm_head.weight.data
        return tensors

    def gradients(self) -> dict[str, Tensor]:
        """Gradients under the same names; copies have none of their own."""
        named = {n: p.grad for n, p in self.model.named_parameters()}
        gradients = _published(named)
        for depth, layer in enumerate(self.mtp):
            prefix = f"model.layers.{self.num_layers + depth}."
            gradients |= _published(
                {prefix + _mtp_name(n): p.grad for n, p in layer.named_parameters()}
            )
        return gradients

    def save(self, directory: Path, *, dtype: torch.dtype = torch.float32) -> Path:
        """Writes config.json and one safetensors file; `expert_bias` stays fp32."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: tensor.detach().clone().to(torch.float32 if "e_score" in name else dtype)
            for name, tensor in self.tensors().items()
        }
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        config = json.loads(self.model.config.to_json_string(use_diff=False))
        config["architectures"] = ["DeepseekV3ForCausalLM"]
        (directory / "config.json").write_text(json.dumps(config))
        return directory


def build(
    seed: int = 0, *, weight_std: float = 0.12, bias_std: float = 0.2, **changes: Any
) -> Reference:
    """A small model; `changes` are fields of DeepseekV3Config.

    With a `bias_std` of 100 the biases alone choose the experts: no rounding can change them. A
    wide model with a large `weight_std` magnifies rounding from layer to layer.
    """
    torch.manual_seed(seed)
    config = DeepseekV3Config(**{**SMALL, **changes}, attn_implementation="eager")
    model = DeepseekV3ForCausalLM(config).eval().float()
    mtp = nn.ModuleList(
        MtpLayer(
            config,
            modeling.DeepseekV3DecoderLayer,
            modeling.DeepseekV3RMSNorm,
            config.num_hidden_layers + depth,
        )
        for depth in range(config.num_mtp_layers)
    ).eval()
    for parameter in [*model.parameters(), *mtp.parameters()]:
        mean, std = (1.0, 0.2) if parameter.dim() == 1 else (0.0, weight_std)
        parameter.data.normal_(mean, std)
    for name, buffer in [*model.named_buffers(), *mtp.named_buffers()]:
        if "e_score" in name:
            buffer.copy_(torch.randn_like(buffer) * bias_std)
    return Reference(model, mtp)


def read(directory: Path) -> dict[str, Tensor]:
    """Every tensor of an HF directory."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def _mtp_name(name: str) -> str:
    return name.replace("mtp_block.", "").replace("post_norm.", "shared_head.norm.")


def _published(state: dict[str, Any]) -> dict[str, Any]:
    """transformers keeps a layer's experts in two 3-D tensors; the checkpoint has one each."""
    tensors: dict[str, Any] = {}
    for name, value in state.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(value):
                stem = name.removesuffix("gate_up_proj")
                gate, up = both.chunk(2)
                tensors[f"{stem}{expert}.gate_proj.weight"] = gate
                tensors[f"{stem}{expert}.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(value):
                tensors[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = down
        else:
            tensors[name] = value
    return tensors
