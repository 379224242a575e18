"""transformers' own layers, filled from a checkpoint directory and handed out one at a time.

The outside reference of the parity gate. It shares no code with the model and does not know the
mapping table: a layer's tensors are found by the names of transformers' modules. Memory holds what
the caller keeps: for the 671B a layer of experts is 46 GB in fp32, the head 4 GB.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

from megatron_dsv3.config.hf_config import read_config_json
from megatron_dsv3.convert.hf_io import HFReader
from megatron_dsv3.convert.mapping import HF_EMBEDDING, HF_HEAD

_EXPERT_PARTS = {
    "mlp.experts.gate_up_proj": ("gate_proj", "up_proj"),
    "mlp.experts.down_proj": ("down_proj",),
}
"""transformers stacks a layer's experts; the files have each alone, gate and up apart."""
_RENAMED = {"mtp_block.": "", "post_norm.": "shared_head.norm."}
"""What transformers calls parts of an MTP layer, and what the files do."""
_COPIES = ("embed_tokens.weight", "shared_head.head.weight")
"""Tensors of an MTP layer that repeat those of the main model."""


class HFLayers:
    """The parts of one checkpoint, in one dtype, on the CPU; every call builds its part anew."""

    def __init__(self, directory: Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Reads the configuration and the files' headers, no weight.

        Args:
            directory: A Hugging Face checkpoint, BF16, FP32 or FP8 (its scales are applied).
            dtype: Of the layers' weights and arithmetic; the experts' bias is fp32 in any.
        """
        self.reader = HFReader(directory)
        self.config = DeepseekV3Config.from_dict(read_config_json(directory))
        self.config._attn_implementation = "eager"
        self.dtype = dtype
        self._rotary = modeling.DeepseekV3RotaryEmbedding(self.config)

    @property
    def num_layers(self) -> int:
        """Decoder layers, MTP not counted."""
        number: int = self.config.num_hidden_layers
        return number

    def embed(self, tokens: Tensor) -> Tensor:
        """[n] -> [n, hidden]; of the files, only the rows of these tokens are read."""
        return F.embedding(tokens, self.reader.read(HF_EMBEDDING)).to(self.dtype)

    def layer(self, index: int) -> "DecoderLayer":
        """One decoder layer."""
        with torch.device("meta"):
            module = modeling.DeepseekV3DecoderLayer(self.config, index)
        return DecoderLayer(self._filled(module, f"model.layers.{index}."), self._rotary)

    def mtp_layer(self, depth: int) -> "PredictionLayer":
        """One MTP layer, with all that surrounds its decoder layer; the first depth is 0."""
        index = self.num_layers + depth
        with torch.device("meta"):
            module = MtpLayer(
                self.config, modeling.DeepseekV3DecoderLayer, modeling.DeepseekV3RMSNorm, index
            )
        return PredictionLayer(self._filled(module, f"model.layers.{index}."), self._rotary)

    def norm(self) -> nn.Module:
        """The norm between the last decoder layer and the head."""
        module = modeling.DeepseekV3RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        return self._filled(module, "model.norm.")

    def head(self) -> nn.Module:
        """Hidden states -> logits, for every depth."""
        name = HF_EMBEDDING if self.config.tie_word_embeddings else HF_HEAD
        with torch.device("meta"):
            module = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        return self._filled(module, name.removesuffix("weight"))

    @torch.no_grad()
    def _filled(self, module: nn.Module, prefix: str) -> nn.Module:
        """Gives the module its weights; strict both ways, like every load."""
        module = module.to(self.dtype).to_empty(device="cpu").eval().requires_grad_(False)
        left = {name for name in self.reader.names() if name.startswith(prefix)}
        left -= {prefix + copy for copy in _COPIES}
        missing = []
        for name, target in module.state_dict(keep_vars=True).items():
            # A bias through bf16 chooses other experts.
            target.data = target.data.float() if "e_score" in name else target.data
            for source, part in _sources(name, target, prefix):
                if source in left:
                    part.copy_(self.reader.read(source))
                    left.remove(source)
                else:
                    missing.append(source)
        if missing or left:
            raise ValueError(
                f"{self.reader.directory}: {prefix}* does not fit transformers' layer: missing "
                f"{sorted(missing)}, surplus {sorted(left)}"
            )
        return module


def _sources(name: str, target: Tensor, prefix: str) -> list[tuple[str, Tensor]]:
    """Names in the files of what fills a tensor of transformers' module, each with its place."""
    for theirs, published in _RENAMED.items():
        if name.startswith(theirs):
            name = published + name.removeprefix(theirs)
    parts = _EXPERT_PARTS.get(name)
    if parts is None:
        return [(prefix + name, target.data)]
    return [
        (f"{prefix}mlp.experts.{index}.{part}.weight", place)
        for index, expert in enumerate(target.data)
        for part, place in zip(parts, expert.chunk(len(parts)), strict=True)
    ]


class DecoderLayer:
    """One decoder layer over one document."""

    def __init__(self, module: nn.Module, rotary: nn.Module) -> None:
        self.module, self._rotary = module, rotary

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, hidden], causal, positions from 0."""
        batch, positions, mask = _document(hidden)
        output: Tensor = self.module(
            batch,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=self._rotary(batch, positions),
        )
        return output[0]


class PredictionLayer:
    """One MTP layer over one document."""

    def __init__(self, module: nn.Module, rotary: nn.Module) -> None:
        self.module, self._rotary = module, rotary

    @torch.no_grad()
    def __call__(self, embedded: Tensor, previous: Tensor) -> Tensor:
        """Predicts one token further than `previous` does.

        Args:
            embedded: [n, hidden], of the tokens `depth + 1` further on.
            previous: [n, hidden], normed, of the depth before.
        """
        batch, positions, mask = _document(previous)
        rotary = self._rotary(batch, positions)
        output: Tensor = self.module(embedded[None], batch, rotary, mask, positions, None)
        return output[0]


def _document(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As a batch of one: hidden states, positions [1, n], causal mask [1, 1, n, n]."""
    length = len(hidden)
    mask = torch.full((length, length), -torch.inf, dtype=hidden.dtype).triu(1)
    return hidden[None], torch.arange(length)[None], mask[None, None]
