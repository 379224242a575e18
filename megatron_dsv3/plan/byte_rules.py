"""Bytes that follow from settings alone, for what counts on the model and for the closed form."""

from dataclasses import dataclass

from megatron_dsv3.config.sections import OptimizerSection, PrecisionSection
from megatron_dsv3.plan.records import GIB, Workload

FP8_COPIES = 2
"""Bytes of a weight's FP8 copies, by rows and by columns; the scales are one value a block."""
CONTEXT = int(1.1 * GIB)
"""What CUDA and its libraries take of a card before the first tensor."""
COMMUNICATOR = int(0.12 * GIB)
"""NCCL's channels of one group that this rank belongs to."""
UNUSABLE = 0.03
"""Share of activations that the allocator's blocks leave unused; segments that grow
(PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True) make it small."""


@dataclass(frozen=True, slots=True)
class OptimizerBytes:
    """Of one parameter, on the rank that updates it."""

    gpu: float
    host: float = 0.0


def optimizer_bytes(optimizer: OptimizerSection, precision: PrecisionSection) -> OptimizerBytes:
    """What `train.optimizer` makes Megatron-Core keep."""
    if optimizer.moments == "bf16":
        # Transformer Engine's Adam keeps of a bf16 weight's master the 16 bits that bf16 lacks;
        # FP8 recipes let Megatron-Core keep whole fp32 masters.
        master = 2 if precision.fp8 == "off" and precision.compute == "bf16" else 4
        return OptimizerBytes(gpu=master + 2 + 2)
    master = 4 if precision.compute == "bf16" else 0  # fp32 weights are their own masters
    on_gpu, moments = 1 - optimizer.offload_fraction, 8
    # In host memory lie a copy of the weight, its gradient and both moments, all fp32.
    return OptimizerBytes(gpu=(master + moments) * on_gpu, host=16 * optimizer.offload_fraction)


def buffer_bytes(workload: Workload) -> int:
    """What libraries hold on a rank beside torch."""
    return CONTEXT + COMMUNICATOR * _num_groups(workload)


def _num_groups(workload: Workload) -> int:
    """Groups of more than one rank through which this rank talks."""
    parallel = workload.parallel
    world_size = workload.world_size
    sizes = (
        parallel.tp_size,
        parallel.pp_size,
        parallel.cp_size,
        parallel.ep_size,
        parallel.etp_size,
        parallel.dp_size(world_size) * parallel.cp_size,
        parallel.edp_size(world_size),
    )
    return sum(size > 1 for size in sizes)
