"""A small model loaded in a layout and led through the parity gate, in one process or many."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from distributed.worker import samples
from rich.console import Console

from megatron_dsv3.commands.gate import check_parity
from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.job import Job
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import (
    DataSection,
    ExpertsSection,
    ModelSection,
    OutputSection,
    PrecisionSection,
    TrainSection,
)
from megatron_dsv3.convert.bridge import Bridge
from megatron_dsv3.convert.hf_io import HFReader
from megatron_dsv3.convert.parity_gate import Report
from megatron_dsv3.model.build import build_chunks, wrap
from megatron_dsv3.model.config import mcore_config
from megatron_dsv3.model.groups import Groups
from megatron_dsv3.train.step import TrainStep


def check(
    hf_dir: Path,
    groups: Groups,
    parallel: Parallel,
    *,
    dtype: torch.dtype = torch.float32,
    dispatcher: str = "alltoall",
    alter: Callable[[Architecture], Architecture] = lambda arch: arch,
    damage: Callable[[Bridge], None] = lambda bridge: None,
    reference: Path | None = None,
    longest: int = 48,
    transformer_engine: bool = False,
    precision: PrecisionSection = PrecisionSection(),
) -> Report:
    """Raises SharedError as the gate does.

    Args:
        alter: Gives the model another architecture than the files'.
        damage: Changes the loaded model.
        reference: Another directory to compare with.
    """
    checkpoint = Architecture.from_hf(hf_dir)
    arch = alter(checkpoint)
    config = mcore_config(
        arch,
        parallel,
        dtype=dtype,
        device=groups.device,
        experts=ExpertsSection(aux_loss_coefficient=0.0, dispatcher=dispatcher),
        precision=precision,
    )
    chunks = build_chunks(
        arch,
        parallel,
        groups,
        config,
        max_seq_length=2 * longest,
        transformer_engine=transformer_engine,
    )
    bridge = Bridge(chunks, arch, parallel, groups, checkpoint)
    bridge.load(HFReader(hf_dir))
    damage(bridge)
    step = TrainStep(wrap(chunks, config), None, groups, mtp_loss_weight=0.3)
    return check_parity(
        step,
        bridge,
        samples(5, 6, vocab_size=arch.vocab_size, longest=longest),
        job=_job(hf_dir, parallel, precision),
        hf_dir=reference or hf_dir,
        console=Console(file=io.StringIO()),
    )


def without_mtp(arch: Architecture) -> Architecture:
    return replace(arch, num_mtp_layers=0)


def _job(hf_dir: Path, parallel: Parallel, precision: PrecisionSection) -> Job:
    sections: dict[str, Any] = {
        "model": ModelSection(hf_dir=hf_dir),
        "data": DataSection(paths=(hf_dir,), seq_length=4096),
        "train": TrainSection(global_batch_size=1),
        "output": OutputSection(dir=hf_dir),
    }
    return Job(parallel=parallel, precision=precision, **sections)
