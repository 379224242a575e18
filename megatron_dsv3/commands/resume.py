"""Where a training starts: at a checkpoint, if there is a whole one of the same training."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import yaml

from megatron_dsv3.checkpoint.directory import Found
from megatron_dsv3.checkpoint.newest import clean_together, newest_whole
from megatron_dsv3.checkpoint.store import OWN, load, read_common
from megatron_dsv3.commands.assemble import Engine
from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.job import Job, to_yaml
from megatron_dsv3.data.dataset import Position
from megatron_dsv3.model.groups import Groups, SharedError

FREE = (
    *("model.hf_dir", "parallel", "validation", "memory", "output", "log"),
    *("data.store", "data.paths", "data.cache_dir", "data.template", "data.document_multiple"),
    *("data.history_reasoning", "data.on_bad_row"),
    *("checkpoint", "spikes", "train.micro_batch_size", "train.device", "train.hang_timeout_s"),
    *("optimizer.offload_fraction", "optimizer.overlap_grad_reduce"),
    *("optimizer.overlap_param_gather", "experts.dispatcher"),
)
"""Settings that a run may change when it goes on: they move files, time or memory, not the result
(what is read from the files is compared by its hash)."""
_PACKAGES = ("torch", "megatron-core", "transformers", "numpy")


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes two runs parts of one training."""

    job: Job
    arch: Architecture
    tokenizer: str
    """Fingerprint."""
    data: Mapping[str, int | str]
    """Counts and hash of what is trained on; other files of the same content may take their
    place."""

    def state(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return {
            "job": to_yaml(self.job),
            "architecture": self.arch.to_hf(),
            "tokenizer": self.tokenizer,
            "data": dict(self.data),
            "versions": {name: version(name) for name in _PACKAGES},
        }

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """How a saved state contradicts this run, one line each."""
        before, now = _settings(yaml.safe_load(saved["job"])), _settings(self.state_of_job())
        found = [
            f"{name} was {before[name]!r}, is {now[name]!r}"
            for name in before.keys() & now.keys()
            if before[name] != now[name] and not _is_free(name)
        ]
        for what, value in (("architecture", self.arch.to_hf()), ("tokenizer", self.tokenizer)):
            if saved[what] != value:
                found.append(f"the model's {what} is another")
        found += [
            f"data: {name} was {saved['data'][name]}, is {count}"
            for name, count in self.data.items()
            if saved["data"].get(name, count) != count
        ]
        return sorted(found)

    def state_of_job(self) -> dict[str, Any]:
        """The job as it is saved: written and read, so that equal values compare equal."""
        content: dict[str, Any] = yaml.safe_load(to_yaml(self.job))
        return content


START = Position()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is."""

    step: int = 0
    """Optimizer steps done."""
    position: Position = START
    """In the data."""


def find_checkpoint(job: Job, groups: Groups, tell: Callable[[str], None]) -> Found:
    """Collective. The checkpoint to go on from; tells what was ignored, and why."""
    if job.checkpoint.every_steps is None:
        return Found(None, ())
    folder = job.checkpoint_dir
    found = newest_whole(folder, groups, hashes=job.checkpoint.verify_on_resume == "hashes")
    for reason in found.ignored:
        tell(f"ignored checkpoint {reason}")
    clean_together(folder, groups)
    return found


def resume(
    engine: Engine, found: Found, identity: Identity, tell: Callable[[str], None]
) -> Progress:
    """Collective. Loads a checkpoint into model, optimizer, schedule and step.

    Raises:
        ValueError: It is of another training, or cannot be loaded.
    """
    if found.path is None:
        return Progress()
    own = read_common(found.path).get(OWN)
    if own is None:
        raise SharedError(
            f"{found.path}: not saved by megatron-dsv3, so it says nothing of the data's position; "
            f"give another checkpoint.dir"
        )
    if differences := identity.differences(own):
        raise SharedError(
            f"{found.path} is of another training: {'; '.join(differences)}; "
            f"set them back, or give another checkpoint.dir (or output.dir)"
        )
    loaded = load(engine.trainee, found.path)
    engine.step.restore(loaded.own["step"])
    progress = Progress(loaded.step, Position(**loaded.own["position"]))
    layout = "" if loaded.exact_rng else "; another layout, so random states begin at the seed"
    tell(f"resumed from {found.path} after step {loaded.step}{layout}")
    return progress


def own_state(identity: Identity, engine: Engine, after: Position) -> dict[str, Any]:
    """Collective. What `resume` reads."""
    return {**identity.state(), "position": asdict(after), "step": engine.step.state()}


def _settings(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`section.name` -> value."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat |= _settings(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _is_free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in FREE)
