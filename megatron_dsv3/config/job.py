"""What a user writes to start a training: sections of settings, from YAML and `a.b=c` overrides."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.section import Section, problem_lines
from megatron_dsv3.config.yaml_file import dump_yaml, read_yaml, with_overrides


def _expand_home(path: Path) -> Path:
    return Path(os.path.expanduser(path))


def _not_empty(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    if not paths:
        raise ValueError("holds nothing; give at least one file")
    return paths


# Not strict: a path is text in YAML, and a tuple a list.
UserPath = Annotated[Path, Field(strict=False), AfterValidator(_expand_home)]
UserPaths = Annotated[tuple[UserPath, ...], Field(strict=False), AfterValidator(_not_empty)]
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
"""Share that a running mean keeps at each step."""


class ModelSection(Section):
    """The model to start from."""

    hf_dir: UserPath
    """Hugging Face directory: config.json, safetensors (BF16, or DeepSeek's FP8), tokenizer."""


class DataSection(Section):
    """What to learn from."""

    paths: UserPaths
    """Chat files, JSON or JSONL, with `messages` in each row."""
    template: Literal["deepseek_v3", "deepseek_r1", "deepseek_v3_1"] = "deepseek_v3"
    """How messages become tokens; take the one that the model was trained with."""
    seq_length: Count = 32768
    """Tokens of a row. Memory for activations grows with it."""
    too_long: Literal["drop", "truncate", "error"] = "drop"
    """What becomes of a conversation of more than `seq_length` tokens; both of the first two are
    counted and reported."""
    history_reasoning: Literal["strip", "keep"] = "strip"
    """Whether reasoning of earlier turns stays in the context; inference strips it."""


class OptimizerSection(Section):
    """AdamW, its states spread over the data-parallel ranks."""

    lr: Annotated[float, Field(gt=0)] = 2e-7
    """Learning rate after warm-up, the largest of the run."""
    beta1: Decay = 0.9
    """Decay of the running mean of gradients, per step."""
    beta2: Decay = 0.999
    """Decay of the running mean of squared gradients, per step."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the mean squared gradient."""
    weight_decay: NotNegative = 0.0
    """Share of a weight that a step takes away, times the learning rate."""
    clip_grad: NotNegative = 1.0
    """Largest norm of the whole gradient, which is scaled down to it; 0: no limit."""
    overlap_grad_reduce: bool = False
    """Reduce gradients among data-parallel ranks while backward still runs. Changes no numbers."""
    overlap_param_gather: bool = False
    """Gather updated weights while forward already runs. Changes no numbers; needs
    overlap_grad_reduce."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ValueError("overlap_param_gather needs overlap_grad_reduce; set both to true")
        return self


class ScheduleSection(Section):
    """Learning rate over the run: linear warm-up, then decay to `min_lr` at the last step."""

    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after warm-up; constant stays at the optimizer's lr."""
    warmup_fraction: Fraction | None = 0.03
    """Share of all steps spent on warm-up; null where warmup_steps is given."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps of warm-up, instead of warmup_fraction."""
    min_lr: NotNegative = 0.0
    """Learning rate at the last step."""

    @model_validator(mode="before")
    @classmethod
    def _steps_replace_fraction(cls, values: Any) -> Any:
        # Only a fraction that the user wrote can contradict the steps.
        if isinstance(values, dict) and values.get("warmup_steps") is not None:
            return {"warmup_fraction": None, **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.warmup_fraction is None) == (self.warmup_steps is None):
            raise ValueError(
                f"give one of warmup_fraction and warmup_steps, got {self.warmup_fraction} and "
                f"{self.warmup_steps}"
            )
        return self


class TrainSection(Section):
    """How much, how long, on what."""

    global_batch_size: Count
    """Samples per optimizer step, over all processes."""
    micro_batch_size: Count = 1
    """Samples per forward and backward of one data-parallel rank. More fill the GPU better and
    take memory for activations in proportion."""
    num_epochs: Count = 1
    """Passes over the data; training ends after them."""
    num_steps: Count | None = None
    """Optimizer steps after which training ends, where the epochs are not over before; null: no
    limit."""
    seed: Annotated[int, Field(ge=0)] = 1234
    """For the order of samples, and for whatever else is random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: on GPUs where there are any."""


class PrecisionSection(Section):
    """Number formats."""

    compute: Literal["bf16", "fp32"] = "bf16"
    """Weights and activations. The optimizer keeps fp32 copies of bf16 weights; router, expert
    bias and loss are fp32 either way."""


class MtpSection(Section):
    """Multi-token prediction."""

    loss_weight: NotNegative = 0.1
    """Weight of the MTP layers' loss, averaged over them, beside the main loss (paper section
    2.2)."""


class ExpertsSection(Section):
    """Balance of the routed experts."""

    aux_loss_coefficient: NotNegative = 1e-4
    """Weight of the sequence-wise balance loss (alpha of paper eq. 17). Not read from config.json;
    the default is what DeepSeek-V3 was trained with, 0 switches it off."""
    bias_update_rate: NotNegative = 0.0
    """Change of each expert's bias per step towards balance (gamma of paper section 2.1.2); 0
    leaves the biases as loaded."""


class OutputSection(Section):
    """The Hugging Face directory written at the end."""

    dir: UserPath
    """Where to; must not hold anything yet."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of the weights; the expert bias is fp32 in either."""
    shard_size_gb: Annotated[float, Field(gt=0)] = 5.0
    """Largest size of a safetensors file, in GB of 10^9 bytes; a larger tensor has its own."""


class LogSection(Section):
    """What is seen of a run."""

    dir: UserPath | None = None
    """Where TensorBoard's files go; null: beside the output, as <output.dir>-log."""
    every_steps: Count = 1
    """Optimizer steps between two lines; each costs a wait for the GPU."""


class Job(Section):
    """A training, as a user describes it."""

    model: ModelSection
    data: DataSection
    parallel: Parallel = Parallel()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection
    precision: PrecisionSection = PrecisionSection()
    mtp: MtpSection = MtpSection()
    experts: ExpertsSection = ExpertsSection()
    output: OutputSection
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        problems = []
        if self.schedule.min_lr > self.optimizer.lr:
            problems.append(
                f"schedule.min_lr {self.schedule.min_lr} exceeds optimizer.lr {self.optimizer.lr}"
            )
        batch, micro = self.train.global_batch_size, self.train.micro_batch_size
        if batch % micro:
            problems.append(
                f"train.global_batch_size {batch} is not divisible by micro_batch_size({micro})"
            )
        parallel, multiple = self.parallel, self.row_multiple
        if self.data.seq_length % multiple:
            rounded = math.ceil(self.data.seq_length / multiple) * multiple
            problems.append(
                f"data.seq_length {self.data.seq_length} is not divisible by {multiple}, as "
                f"tp_size({parallel.tp_size}) and cp_size({parallel.cp_size}) ask; use {rounded}"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def log_dir(self) -> Path:
        """Where TensorBoard's files go."""
        return self.log.dir or Path(f"{self.output.dir}-log")

    @property
    def row_multiple(self) -> int:
        """What a row's length must be a multiple of.

        Context parallelism gives each rank two pieces, one of each half, so that the causal mask
        costs all the same; sequence parallelism cuts what a rank holds once more.
        """
        cp_size, tp_size = self.parallel.cp_size, self.parallel.tp_size
        return math.lcm(2 * cp_size if cp_size > 1 else 1, cp_size * tp_size)

    def num_micro_batches(self, world_size: int) -> int:
        """Forward and backward passes of a data-parallel rank per optimizer step.

        Raises:
            ValueError: The batch does not divide, or the parallel sizes do not divide the world.
        """
        train, dp_size = self.train, self.parallel.dp_size(world_size)
        at_once = train.micro_batch_size * dp_size
        if train.global_batch_size % at_once:
            raise ValueError(
                f"train.global_batch_size {train.global_batch_size} is not "
                f"micro_batch_size({train.micro_batch_size}) * dp_size({dp_size}) * micro-batches; "
                f"use a multiple of {at_once}"
            )
        return train.global_batch_size // at_once

    def problems(self, arch: Architecture, world_size: int) -> list[str]:
        """Why this job cannot train this model on this many processes; empty where it can."""
        problems = self.parallel.problems(arch, world_size)
        if self.data.seq_length > arch.max_position_embeddings:
            problems.append(
                f"data.seq_length {self.data.seq_length} exceeds the model's "
                f"max_position_embeddings {arch.max_position_embeddings}; lower it"
            )
        # A world that does not divide has no micro-batches either, for the same reason.
        return list(dict.fromkeys(problems + self._batch_problems(world_size)))

    def _batch_problems(self, world_size: int) -> list[str]:
        try:
            num_micro_batches = self.num_micro_batches(world_size)
        except ValueError as error:
            return [str(error)]
        pp_size, vpp_size = self.parallel.pp_size, self.parallel.vpp_size
        if vpp_size == 1 or num_micro_batches % pp_size == 0:
            return []
        return [
            f"with vpp_size({vpp_size}), the {num_micro_batches} micro-batches of a step must be a "
            f"multiple of pp_size({pp_size}); change train.global_batch_size"
        ]


def load_job(path: Path, overrides: Sequence[str] = ()) -> Job:
    """The job of a YAML file, with `a.b=c` overrides; relative paths are meant from here.

    Raises:
        ValueError: With every problem of the file and the overrides, one a line.
    """
    content = with_overrides(read_yaml(path), overrides)
    # A section that is left out or empty has its defaults, and its missing settings are named.
    for name, info in Job.model_fields.items():
        assert isinstance(info.annotation, type)
        if content.get(name) is None:
            content[name] = {}
    try:
        return Job.model_validate(content)
    except ValidationError as error:
        names = [override.partition("=")[0] for override in overrides]
        lines = [
            f"{_origin(name, path, names)}: {name}: {text}" if name else f"{path}: {text}"
            for name, text in problem_lines(error, Job)
        ]
        raise ValueError("\n".join(lines)) from None


def _origin(name: str, path: Path, overridden: Sequence[str]) -> str:
    """Where the user wrote this setting."""
    is_override = any(name == other or name.startswith(f"{other}.") for other in overridden)
    return "override" if is_override else str(path)


def to_yaml(job: Job) -> str:
    """The job as YAML with all its defaults, from which `load_job` gives an equal one."""
    return dump_yaml(job.model_dump(mode="json"))
