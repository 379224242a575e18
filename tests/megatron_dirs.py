"""Small Megatron checkpoints for tests, by our writer in this process or by torch itself."""

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from megatron_dsv3.convert.megatron_write import ToMegatron
from megatron_dsv3.convert.memory import PIECE_BYTES

METADATA = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'


def write_all(direction: ToMegatron, out: Path) -> Path:
    """What the engine does, without processes, journal and cap."""
    out.mkdir(parents=True)
    reports = {
        unit.name: direction.write(
            unit.name, out / unit.name, piece_bytes=PIECE_BYTES, on_bytes=lambda _: None
        ).report
        for unit in direction.units()
    }
    direction.finish(out, reports)
    return out


def save_with_torch(tensors: dict[str, torch.Tensor], out: Path) -> Path:
    """A checkpoint by torch's own writer."""
    dcp.save(tensors, checkpoint_id=out, no_dist=True)
    (out / "metadata.json").write_text(METADATA)
    return out


def edit_index(directory: Path, change: Any) -> None:
    """Lets `change` alter what `.metadata` says."""
    path = directory / ".metadata"
    index = pickle.loads(path.read_bytes())
    change(index)
    path.write_bytes(pickle.dumps(index))
