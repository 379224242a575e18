"""What a user writes to start a training: sections of settings, from YAML and `a.b=c` overrides."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import ValidationError, model_validator

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.kernels import KernelsSection
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.placement import place
from megatron_dsv3.config.section import Section, problem_lines
from megatron_dsv3.config.sections import (
    CheckpointSection,
    DataSection,
    ExpertsSection,
    LogSection,
    MemorySection,
    ModelSection,
    MtpSection,
    OptimizerSection,
    OutputSection,
    PrecisionSection,
    ScheduleSection,
    SpikesSection,
    TrainSection,
    ValidationSection,
)
from megatron_dsv3.config.yaml_file import dump_yaml, read_yaml, with_overrides


class Job(Section):
    """A training, as a user describes it."""

    model: ModelSection
    data: DataSection
    parallel: Parallel = Parallel()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection
    validation: ValidationSection = ValidationSection()
    spikes: SpikesSection = SpikesSection()
    precision: PrecisionSection = PrecisionSection()
    memory: MemorySection = MemorySection()
    kernels: KernelsSection = KernelsSection()
    mtp: MtpSection = MtpSection()
    experts: ExpertsSection = ExpertsSection()
    output: OutputSection
    checkpoint: CheckpointSection = CheckpointSection()
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
        if self.optimizer.gradients == "bf16" and self.precision.compute == "fp32":
            problems.append(
                "optimizer.gradients=bf16 needs precision.compute=bf16; fp32 weights have fp32 "
                "gradients"
            )
        if self.train.verify_first and self.precision.fp8_params:
            problems.append(
                "train.verify_first cannot tell a mistake from what precision.fp8_params has "
                "rounded; set one of them to false, or ask `megatron-dsv3 verify` before the run"
            )
        if self.optimizer.offload_fraction > 0 and self.precision.fp8_params:
            problems.append(
                "precision.fp8_params and optimizer.offload_fraction exclude each other: Megatron-"
                "Core cannot offload the masters of FP8 weights; set one of them to false or 0"
            )
        parallel, multiple = self.parallel, self.row_multiple
        if self.data.seq_length % multiple:
            rounded = math.ceil(self.data.seq_length / multiple) * multiple
            problems.append(
                f"data.seq_length {self.data.seq_length} is not divisible by {multiple}, as "
                f"tp_size({parallel.tp_size}), cp_size({parallel.cp_size}) and "
                f"fp8({self.precision.fp8}) ask; use {rounded}"
            )
        problems += self._document_problems() + self._overlap_problems()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _document_problems(self) -> list[str]:
        multiple, cp_size = self.document_multiple, self.parallel.cp_size
        if cp_size > 1 and multiple % (2 * cp_size):
            return [
                f"data.document_multiple {multiple} is not divisible by 2 * cp_size({cp_size}); "
                f"use {math.lcm(multiple, 2 * cp_size)}"
            ]
        # Its default divides seq_length wherever cp_size does.
        given = self.data.packed and self.data.document_multiple
        if given and self.data.seq_length % multiple:
            return [
                f"data.seq_length {self.data.seq_length} is not divisible by "
                f"data.document_multiple {multiple}; use a power of two for both"
            ]
        return []

    def _overlap_problems(self) -> list[str]:
        if not self.experts.overlap_all_to_all:
            return []
        return [
            f"experts.overlap_all_to_all needs {need}; change that, or set it to false"
            for need in self.overlap_needs
        ]

    @property
    def overlap_needs(self) -> list[str]:
        """What `experts.overlap_all_to_all` needs that this job does not have.

        Megatron-Core's combined schedule asks for it, or it was never tried without it here.
        """
        parallel, memory = self.parallel, self.memory
        recomputed = memory.recompute_modules if memory.recompute == "selective" else ()
        rules = {
            "parallel.ep_size > 1: one rank with all experts sends nothing": parallel.ep_size == 1,
            f"parallel.vpp_size > 1 with pp_size({parallel.pp_size})": (
                parallel.pp_size > 1 and parallel.vpp_size == 1
            ),
            "experts.dispatcher=alltoall": self.experts.dispatcher != "alltoall",
            "precision.compute=bf16": self.precision.compute != "bf16",
            "memory.recompute=selective or none": memory.recompute == "full",
            "memory.recompute_modules without moe": "moe" in recomputed,
            "memory.offload_activations=[]": bool(memory.offload_activations),
        }
        return [need for need, broken in rules.items() if broken]

    @property
    def document_multiple(self) -> int:
        """What a packed document's part of a row is a multiple of, so that CP can cut it."""
        cp_size = self.parallel.cp_size
        return self.data.document_multiple or (2 * cp_size if cp_size > 1 else 1)

    @property
    def cache_dir(self) -> Path:
        """Where stores of chat files are kept."""
        return self.data.cache_dir or self.log_dir / "data"

    @property
    def log_dir(self) -> Path:
        """Where TensorBoard's files go."""
        return self.log.dir or Path(f"{self.output.dir}-log")

    @property
    def checkpoint_dir(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.checkpoint.dir or Path(f"{self.output.dir}-checkpoints")

    @property
    def row_multiple(self) -> int:
        """What a row's length must be a multiple of.

        Context parallelism gives each rank two pieces, one of each half, so that the causal mask
        costs all the same; sequence parallelism cuts what a rank holds once more. FP8 products need
        a number of tokens on each rank that their blocks divide.
        """
        cp_size, tp_size = self.parallel.cp_size, self.parallel.tp_size
        return math.lcm(
            2 * cp_size if cp_size > 1 else 1, cp_size * tp_size * self.precision.row_multiple
        )

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
        problems = self.parallel.problems(arch, world_size) + self._placement_problems(arch)
        if self.data.seq_length > arch.max_position_embeddings:
            problems.append(
                f"data.seq_length {self.data.seq_length} exceeds the model's "
                f"max_position_embeddings {arch.max_position_embeddings}; lower it"
            )
        problems += self._bf16_layer_problems(arch)
        # A world that does not divide has no micro-batches either, for the same reason.
        return list(dict.fromkeys(problems + self._batch_problems(world_size)))

    def backend_problems(self, device: Literal["cpu", "cuda"]) -> list[str]:
        """What this kind of device cannot do, and the nearest that it can."""
        if device == "cuda":
            fp32 = (
                "precision.compute=fp32: no attention kernel of a GPU takes packed rows in fp32; "
            )
            fp32 += "use bf16, or train.device=cpu"
            return [fp32] if self.precision.compute == "fp32" else []
        optimizer, memory, parallel = self.optimizer, self.memory, self.parallel
        rules = {
            "optimizer.moments=bf16 needs Transformer Engine on a GPU; use fp32": (
                optimizer.moments == "bf16"
            ),
            f"precision.fp8={self.precision.fp8} needs Transformer Engine on a GPU; use off": (
                self.precision.fp8 != "off"
            ),
            "optimizer.offload_fraction needs a GPU to offload from; use 0": (
                optimizer.offload_fraction > 0
            ),
            "memory.offload_activations needs a GPU to offload from; use []": bool(
                memory.offload_activations
            ),
            f"parallel.etp_size({parallel.etp_size}) with experts.dispatcher=alltoall gathers "
            "uneven parts, which gloo refuses; use experts.dispatcher=allgather or etp_size 1": (
                parallel.etp_size > 1 and self.experts.dispatcher == "alltoall"
            ),
        }
        return [message for message, broken in rules.items() if broken]

    def _placement_problems(self, arch: Architecture) -> list[str]:
        if self.parallel.depth_problems(arch):
            return []
        try:
            stages = place(arch, self.parallel)
        except ValueError as error:
            return [str(error)]
        apart = any(stage.mtp_layers and not stage.has_loss for stage in stages)
        if apart and arch.tie_embeddings:
            return [
                "parallel.stages puts MTP on another chunk than the loss, but with tied embeddings "
                "both hold the embedding; put them together"
            ]
        if self.experts.overlap_all_to_all and (apart or arch.num_mtp_layers > 1):
            return [
                "experts.overlap_all_to_all needs at most one MTP layer, on the chunk of the loss; "
                "change mtp.mode or parallel.stages, or set it to false"
            ]
        return []

    def _bf16_layer_problems(self, arch: Architecture) -> list[str]:
        """Megatron-Core's rule, in its own words not before the process groups are there."""
        pp_size, most = self.parallel.pp_size, arch.num_layers // self.parallel.pp_size
        given = {
            "bf16_first_layers": self.precision.bf16_first_layers,
            "bf16_last_layers": self.precision.bf16_last_layers,
        }
        return [
            f"precision.{name} {number} exceeds num_hidden_layers({arch.num_layers}) // "
            f"pp_size({pp_size}) = {most}; use at most that"
            for name, number in given.items()
            if number > most
        ]

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
