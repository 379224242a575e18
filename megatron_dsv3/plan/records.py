"""What the planner's parts hand to each other: a workload, a card, bytes by stage, a step's times.

Bytes are integers, times seconds, rates 10^12 operations or 10^9 bytes a second. A pipeline stage
is all chunks that one pipeline rank holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.job import Job
from megatron_dsv3.config.kernels import KernelsSection
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.sections import (
    ExpertsSection,
    MemorySection,
    OptimizerSection,
    PrecisionSection,
)

GIB = 2**30
HOST_ROUNDING = 2
"""Pinned memory comes in powers of two: at most so many times what is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A job as far as memory and speed depend on it."""

    arch: Architecture
    """Of the model that is trained: without MTP where the job leaves it out."""
    parallel: Parallel
    world_size: int
    seq_length: int
    """Tokens of a row, before context parallelism cuts it."""
    micro_batch_size: int = 1
    """Rows of a micro-batch; they are laid end to end."""
    num_micro_batches: int = 1
    """Of a data-parallel rank, in a step."""
    document_length: int | None = None
    """Tokens of a typical document, which attention costs by; None: a row is one document."""
    precision: PrecisionSection = PrecisionSection()
    memory: MemorySection = MemorySection()
    optimizer: OptimizerSection = OptimizerSection()
    experts: ExpertsSection = ExpertsSection()
    kernels: KernelsSection = KernelsSection()
    mtp_frozen: bool = False
    imbalance: float = 1.0
    """Tokens that the busiest rank's experts get, over the mean; 1 is perfect balance."""

    @classmethod
    def of_job(
        cls,
        job: Job,
        arch: Architecture,
        world_size: int,
        *,
        imbalance: float = 1.0,
        document_length: int | None = None,
    ) -> Self:
        """What a job asks of `world_size` processes; `arch` as in the model's files.

        Raises:
            ValueError: The job cannot run so; with every reason.
        """
        trained = replace(arch, num_mtp_layers=0) if job.mtp.mode == "off" else arch
        if problems := job.problems(trained, world_size):
            raise ValueError("\n".join(problems))
        return cls(
            arch=trained,
            parallel=job.parallel,
            world_size=world_size,
            seq_length=job.data.seq_length,
            micro_batch_size=job.train.micro_batch_size,
            num_micro_batches=job.num_micro_batches(world_size),
            document_length=document_length,
            precision=job.precision,
            memory=job.memory,
            optimizer=job.optimizer,
            experts=job.experts,
            kernels=job.kernels,
            mtp_frozen=job.mtp.mode == "freeze",
            imbalance=imbalance,
        )

    @property
    def num_ahead(self) -> int:
        """Micro-batches in flight beyond those of the pipeline's schedule."""
        return int(self.experts.overlap_all_to_all)

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of a micro-batch between tensor-parallel layers, on one context-parallel rank."""
        return self.seq_length * self.micro_batch_size // self.parallel.cp_size


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Bytes of one rank that stay from step to step."""

    parameters: int
    """Numbers, not bytes: trained ones that this rank holds."""
    weights: int
    gradients: int
    optimizer: int
    """Masters and moments on the GPU."""
    optimizer_host: int = 0
    """Masters, moments and gradients in host memory."""
    caches: int = 0
    """What Transformer Engine keeps: FP8 copies of weights, workspaces, stand-ins for gradients."""
    update: int = 0
    """What the update takes for a moment, when activations are gone."""

    @property
    def gpu(self) -> int:
        """All on the GPU."""
        return self.weights + self.gradients + self.optimizer + self.caches


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Bytes of one rank that come and go within a step, at the step's peak."""

    saved: int
    """For backward, of all micro-batches in flight, without what stands apart below."""
    experts: int
    """Of `saved`'s kind, but grows with the imbalance: tokens sent to this rank's experts."""
    recomputed: int
    """The largest piece that is computed again, at once."""
    logits: int
    """Logits, their gradient and the loss, of all depths that are there at once."""
    mtp: int
    """For backward, of the MTP layers."""
    working: int
    """Short-lived: gradients of activations and workspaces at the peak."""
    in_flight: float
    """Micro-batches whose activations this stage holds at once, in units of the whole stage."""
    host: int = 0
    """In host memory, of all micro-batches in flight."""

    @property
    def total(self) -> int:
        """At the peak."""
        kept = self.saved + self.experts + self.recomputed
        return kept + self.logits + self.mtp + self.working


def allocated(states: States, activations: Activations) -> int:
    """At the peak of a step: in forward and backward, or in the update."""
    return states.gpu + max(activations.total, states.update)


def on_host(states: States, activations: Activations) -> int:
    """In the memory of the rank's node."""
    return states.optimizer_host + HOST_ROUNDING * activations.host


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Of the fullest rank of one pipeline stage."""

    pp_rank: int
    letters: str
    """Its chunks, as in `parallel.stages`."""
    states: States
    activations: Activations
    buffers: int
    """What communication holds: gathered weights, receive buffers, NCCL's own."""
    fragmentation: int
    """Allowance for what the allocator cannot use."""

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` will say."""
        return allocated(self.states, self.activations)

    @property
    def total(self) -> int:
        """What the card must have."""
        return self.allocated + self.buffers + self.fragmentation


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """An accelerator, a node of them, and their network, as the planner sees them.

    Rates on paper are the vendor's, without sparsity; reached ones are those of large products.
    Bandwidths are those that are reached. `cards.cluster_of` makes one of a name or a file.
    """

    name: str
    memory_gib: float
    """What a process can use of it."""
    bf16_tflops: float
    bf16_tflops_reached: float
    fp8_tflops: float | None
    """None: the card has no FP8."""
    fp8_tflops_reached: float | None
    hbm_gb_s: float
    nvlink_gb_s: float
    """Of one GPU, in one direction."""
    network_gb_s: float
    """Between nodes, of one GPU, in one direction."""
    host_gb_s: float = 50.0
    """Between a GPU and host memory, in one direction."""
    nvlink_latency_s: float = 5e-6
    network_latency_s: float = 15e-6
    measured: bool = False
    """Whether kernels were measured on it; else their efficiency is taken from another card."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each number is from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Where a workload would run."""

    card: Card
    gpus_per_node: int = 8
    host_memory_gib: float = 2000.0
    """Of a node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of a step, on the slowest path: they sum to it."""

    compute: float
    """Of the stage that sets the pace, over all its micro-batches."""
    tp: float
    """Communication that nothing hides, by kind."""
    ep: float
    cp: float
    dp: float
    bubble: float
    """Waiting of the pipeline, sends between stages included."""
    optimizer: float
    tokens_per_second_per_gpu: float
    tflops: float
    """Model FLOPs a second and GPU, in 10^12."""
    mfu: float
    """Over the card's bf16 rate on paper."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """Where each number comes from, for --explain."""

    @property
    def total(self) -> float:
        """Of the step."""
        communication = self.tp + self.ep + self.cp + self.dp
        return self.compute + communication + self.bubble + self.optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A workload on a cluster, with what comes of it."""

    workload: Workload
    cluster: Cluster
    stages: tuple[StageMemory, ...]
    step: StepTime

    @property
    def fullest(self) -> StageMemory:
        """The stage that decides whether it fits."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def spare_gib(self) -> float:
        """Left on the fullest card; negative: missing."""
        return self.cluster.card.memory_gib - self.fullest.total / GIB

    @property
    def host_gib(self) -> float:
        """States and activations in a node's host memory, of the fullest stage."""
        fullest = max(on_host(stage.states, stage.activations) for stage in self.stages)
        return fullest * self.cluster.gpus_per_node / GIB
