"""A training's own plan: printed at its start, and beside it at the end what was measured.

The plan is made by a process of its own on rank 0, while weights are loaded: it stands in for the
kernels that this process is about to use.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_dsv3.config.job import Job, to_yaml
from megatron_dsv3.model.groups import Groups
from megatron_dsv3.plan.cards import load_card, names
from megatron_dsv3.plan.records import GIB

PATIENCE_S = 120
"""How long a plan may take; none is worth waiting for longer."""
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Planning:
    """A plan that is being made."""

    process: subprocess.Popen[str]
    folder: tempfile.TemporaryDirectory[str]
    """Holds the job and the plan's figures; goes with this record."""

    @property
    def figures(self) -> Path:
        """What `plan show --json` writes."""
        return Path(self.folder.name) / "plan.json"


def begin(job: Job, groups: Groups) -> Planning | None:
    """Starts to plan; None: another rank does, or this is no GPU that the planner knows."""
    if groups.rank != 0 or groups.device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(groups.device)
    card = card_of(properties.name, properties.total_memory / GIB)
    if card is None:
        return None
    folder = tempfile.TemporaryDirectory(prefix="plan-")
    path = Path(folder.name) / "job.yaml"
    path.write_text(to_yaml(job), encoding="utf-8")
    command = [sys.executable, "-m", "megatron_dsv3.cli", "plan", "show", str(path)]
    command += ["--gpus", str(groups.world_size), "--gpu", card]
    command += ["--json", str(Path(folder.name) / "plan.json")]
    environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "110"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return Planning(process, folder)


def finish(planning: Planning | None, tell: Tell) -> Mapping[int, float]:
    """Tells the plan; GiB that each pipeline stage is to allocate. Empty where there is none.

    A plan is a help: that there is none is told, and stops nothing.
    """
    if planning is None:
        return {}
    try:
        text, _ = planning.process.communicate(timeout=PATIENCE_S)
        tell(text.rstrip())
        if planning.process.returncode or not planning.figures.is_file():
            return {}
        content = json.loads(planning.figures.read_text(encoding="utf-8"))
        return {stage["pp_rank"]: stage["allocated_gib"] for stage in content["stages"]}
    except subprocess.TimeoutExpired:
        planning.process.kill()
        planning.process.communicate()
        tell(f"no plan within {PATIENCE_S} s")
        return {}
    finally:
        planning.folder.cleanup()


def tell_peaks(planned: Mapping[int, float], groups: Groups, tell: Tell) -> None:
    """Collective: the largest memory allocated on any rank of each stage, beside the plan's."""
    if groups.device.type != "cuda":
        return
    mine = (groups.pp_rank, torch.cuda.max_memory_allocated(groups.device) / GIB)
    everyone: list[tuple[int, float]] = [mine] * groups.world_size
    dist.all_gather_object(everyone, mine)
    tell("; ".join(peak_texts(everyone, planned)))


def peak_texts(peaks: list[tuple[int, float]], planned: Mapping[int, float]) -> list[str]:
    """One text a stage, from (pipeline rank, GiB) of every rank."""
    largest: dict[int, float] = {}
    for pp_rank, peak in peaks:
        largest[pp_rank] = max(peak, largest.get(pp_rank, 0.0))
    return [
        f"stage {pp_rank}: {largest[pp_rank]:.1f} GiB at most"
        + (f", {planned[pp_rank]:.1f} planned" if pp_rank in planned else "")
        for pp_rank in sorted(largest)
    ]


def card_of(device_name: str, memory_gib: float) -> str | None:
    """The known card of this name, and of its kinds the one whose memory is nearest."""
    cards = {name: load_card(name) for name in names("cards")}
    known = {n: card for n, card in cards.items() if card.device and card.device in device_name}
    longest = max((len(card.device or "") for card in known.values()), default=0)
    fitting = {n: c.memory_gib for n, c in known.items() if len(c.device or "") == longest}
    return min(fitting, key=lambda name: abs(fitting[name] - memory_gib), default=None)
