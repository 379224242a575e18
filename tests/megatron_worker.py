"""Loads a converted checkpoint with Megatron-Core's own `load`, and saves one with its own `save`.

    torchrun --nproc-per-node N megatron_worker.py HF_DIR CONVERTED SAVED [tp_size=2 ...]

Every rank compares each of its tensors with what the online load gives, bit for bit.
`SAVED/weights` gets weights alone, `SAVED/training` the optimizer's states as well.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import OptimizerSection
from megatron_dsv3.convert.bridge import Bridge
from megatron_dsv3.convert.hf_io import HFReader
from megatron_dsv3.model import cpu
from megatron_dsv3.model.build import build_chunks, stages_of_rank, wrap
from megatron_dsv3.model.config import mcore_config
from megatron_dsv3.model.groups import start, stop
from megatron_dsv3.model.spec import block_specs
from megatron_dsv3.train.optimizer import build_optimizer

LENGTH = 48
OPTIMIZER = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


class Ranks:
    """One rank's models of a layout."""

    def __init__(self, hf_dir: Path, parallel: Parallel) -> None:
        self.hf_dir = hf_dir
        self.parallel = parallel
        self.arch = Architecture.from_hf(hf_dir)
        self.groups = start(parallel, torch.device("cpu"))
        self.config = mcore_config(
            self.arch, parallel, dtype=torch.bfloat16, device=self.groups.device
        )
        self.metadata: dict[str, Any] = {"dp_cp_group": self.groups.collection.dp_cp}

    def online(self) -> list[Any]:
        """Our model, filled from the HF directory."""
        chunks = build_chunks(
            self.arch,
            self.parallel,
            self.groups,
            self.config,
            max_seq_length=LENGTH,
            transformer_engine=False,
        )
        Bridge(chunks, self.arch, self.parallel, self.groups).load(HFReader(self.hf_dir))
        return list(chunks)

    def plain(self) -> Any:
        """Megatron-Core's own GPTModel with random weights."""
        (stage,) = stages_of_rank(self.arch, self.parallel, self.groups.pp_rank)
        decoder, mtp = block_specs(self.config, stage, transformer_engine=False)
        return GPTModel(
            self.config,
            decoder,
            vocab_size=self.arch.vocab_size,
            max_sequence_length=LENGTH,
            pre_process=stage.has_embedding,
            post_process=stage.has_loss,
            position_embedding_type="none",
            mtp_block_spec=mtp,
        ).bfloat16()

    def load(self, model: Any, directory: Path) -> None:
        """Megatron-Core's own load, strict both ways."""
        state = {"model": model.sharded_state_dict(metadata=self.metadata)}
        with torch.no_grad():
            loaded = dist_checkpointing.load(state, str(directory), strict="raise_all")
            model.load_state_dict(loaded["model"], strict=True)


def compare(ours: Any, theirs: Any) -> None:
    """Raises for the first tensor that is not the same."""
    wanted, found = ours.state_dict(), theirs.state_dict()
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            assert torch.equal(tensor.float(), found[name].float()), name


def save(ranks: Ranks, chunks: list[Any], directory: Path) -> None:
    """Megatron-Core's own save, of weights alone and with an optimizer."""
    metadata = ranks.metadata | OPTIMIZER
    weights, training = directory / "weights", directory / "training"
    for folder in (weights, training):
        folder.mkdir(parents=True, exist_ok=True)
    state = {"model": chunks[0].sharded_state_dict(metadata=metadata)}
    dist_checkpointing.save(state, str(weights))
    wrapped = wrap(chunks, ranks.config)
    optimizer = build_optimizer(OptimizerSection(), wrapped, dtype=torch.bfloat16)
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner._init_optimizer_states_with_dummy_values()
    state = {"model": chunks[0].sharded_state_dict(metadata=metadata), "iteration": 7}
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=False, metadata=metadata)
    dist_checkpointing.save(state, str(training))


def main(hf_dir: str, converted: str, saved: str, *layout: str) -> None:
    """Loads, compares, saves."""
    cpu.enable()
    sizes = {name: int(size) for name, size in (item.split("=") for item in layout)}
    ranks = Ranks(Path(hf_dir), Parallel(**sizes))
    online, plain = ranks.online(), ranks.plain()
    ranks.load(plain, Path(converted))
    for router in (m for m in plain.modules() if hasattr(m, "expert_bias")):
        assert router.expert_bias is None or router.expert_bias.dtype == torch.float32
    compare(online[0], plain)
    save(ranks, online, Path(saved))
    stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
