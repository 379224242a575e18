"""Bytes that stay from step to step, exact: read off the real stage, its buffers and its optimizer.

The stage is built on the meta device as one rank of the whole world, wrapped for data parallelism,
and given the distributed optimizer; nothing is derived from the architecture by hand.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_dsv3.config.counts import OFFLOADED_STATE_BYTES
from megatron_dsv3.config.sections import OptimizerSection, PrecisionSection
from megatron_dsv3.model.gpt import DeepseekV3Model
from megatron_dsv3.plan.build import DTYPES, Built
from megatron_dsv3.plan.records import States, Workload
from megatron_dsv3.plan.stand_ins import is_product

BuildOptimizer = Callable[..., Any]
"""`train.optimizer.build_optimizer`, which lives on this floor and so is handed in."""

FP8_COPIES = 2
"""Bytes of a weight's FP8 copies, by rows and by columns; the scales are one value a block."""
GEMM_WORKSPACES = 6 * 32 * 2**20
"""cuBLAS's on Hopper: torch's, Transformer Engine's, and four of its grouped products."""


@dataclass(frozen=True, slots=True)
class OptimizerBytes:
    """Of one parameter, on the rank that updates it."""

    gpu: float
    host: float = 0.0


def count_states(built: Built, workload: Workload, build_optimizer: BuildOptimizer) -> States:
    """Of the rank whose chunks were built."""
    dtype = DTYPES[workload.precision.compute]
    # Where masters and moments are is a matter of bytes: the parts are those of the plain one.
    plain = workload.optimizer.model_copy(update={"moments": "fp32", "offload_fraction": 0.0})
    optimizer = build_optimizer(plain, built.wrapped, dtype=dtype)
    own = sum(
        parameter.numel()
        for part in optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for parameter in group["params"]
    )
    each = optimizer_bytes(workload.optimizer, workload.precision)
    buffers = list(_buffers(built.wrapped))
    parameters = [p for chunk in built.chunks for p in chunk.parameters()]
    trained = [p for p in parameters if p.requires_grad]
    frozen = [p for p in parameters if not p.requires_grad]
    weights = list(chain.from_iterable(map(product_weights, built.chunks)))
    return States(
        parameters=sum(p.numel() for p in trained),
        weights=sum(_nbytes(buffer.param_data) for buffer in buffers)
        + sum(_nbytes(tensor) for tensor in frozen),
        gradients=sum(_nbytes(buffer.grad_data) for buffer in buffers),
        optimizer=int(own * each.gpu),
        optimizer_host=int(own * each.host),
        caches=caches(weights, workload.precision),
        update=update_bytes(own, _own_products(weights, workload), workload),
    )


def optimizer_bytes(optimizer: OptimizerSection, precision: PrecisionSection) -> OptimizerBytes:
    """What `train.optimizer` makes Megatron-Core keep."""
    if optimizer.moments == "bf16":
        # Transformer Engine's Adam keeps of a bf16 weight's master the 16 bits that bf16 lacks; of
        # FP8 weights Megatron-Core keeps whole fp32 masters.
        master = 2 if precision.compute == "bf16" and not precision.fp8_params else 4
        return OptimizerBytes(gpu=master + 2 + 2)
    master = 4 if precision.compute == "bf16" else 0  # fp32 weights are their own masters
    on_gpu, moments = 1 - optimizer.offload_fraction, 8
    # In host memory lie a copy of the weight, its gradient and both moments, all fp32.
    host = OFFLOADED_STATE_BYTES * optimizer.offload_fraction
    return OptimizerBytes(gpu=(master + moments) * on_gpu, host=host)


def _buffers(wrapped: Iterable[DistributedDataParallel]) -> Iterator[Any]:
    for module in wrapped:
        yield from (*module.buffers, *module.expert_parallel_buffers)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight whose gradient goes straight into its buffer."""

    name: str
    shape: tuple[int, ...]
    precision: str
    """Of its products."""
    is_product: bool
    """Whether it is one of Transformer Engine's; else the head's."""

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def is_expert(self) -> bool:
        """Whether it is a routed expert's."""
        return ".experts." in self.name


def product_weights(chunk: DeepseekV3Model) -> list[Weight]:
    """The trained weights of Transformer Engine's linears and of the head."""
    weights = [
        Weight(f"{prefix}.{name}", tuple(weight.shape), module.precision, True)
        for prefix, module in chunk.named_modules()
        if is_product(module)
        for name, weight in module.named_parameters(recurse=False)
        if weight.requires_grad and name != "layer_norm_weight"
    ]
    head = dict(chunk.named_parameters()).get("output_layer.weight")
    if head is not None and head.requires_grad:
        weights.append(Weight("output_layer.weight", tuple(head.shape), "bf16", False))
    return weights


def _own_products(weights: Iterable[Weight], workload: Workload) -> float:
    """Numbers in FP8 products that this rank updates."""
    products = [w for w in weights if w.is_product and w.precision != "bf16"]
    parallel = workload.parallel
    copies = parallel.dp_size(workload.world_size) * parallel.cp_size
    experts = sum(w.size for w in products if w.is_expert)
    common = sum(w.size for w in products) - experts
    shares = common / copies + experts / parallel.edp_size(workload.world_size)
    return shares * parallel.num_optimizer_instances


def update_bytes(own: float, products: float, workload: Workload) -> int:
    """What the update takes for a moment beside states.

    Args:
        own: Numbers that this rank updates.
        products: Of these, those of products in FP8.
        workload: How they are kept.
    """
    optimizer, precision = workload.optimizer, workload.precision
    size = 0.0
    if precision.fp8_params:
        # Transformer Engine casts all masters to bf16 before it casts the first of them to FP8, so
        # that weights are the same as with a copy in bf16.
        size += 2 * products
    in_adam = optimizer.moments == "bf16" and not precision.fp8_params
    if optimizer.gradients == "bf16" and not in_adam:
        # Where Megatron-Core keeps the masters it hands Adam gradients of their type. Those of
        # masters in host memory are copied to there.
        size += 4 * own * (1 - optimizer.offload_fraction)
    return int(size)


def caches(weights: Iterable[Weight], precision: PrecisionSection) -> int:
    """What Transformer Engine keeps beside weights and gradients."""
    weights = list(weights)
    copied = [w.size for w in weights if w.is_product and w.precision != "bf16"]
    empty = sum(math.prod(shape) for shape in {w.shape for w in weights})
    return cache_bytes(empty, sum(copied), precision)


def cache_bytes(empty: int, copied: float, precision: PrecisionSection) -> int:
    """The same from sums.

    Args:
        empty: Numbers in the different shapes of weights whose gradients go straight into their
            buffer: autograd gets an empty bf16 tensor of each shape.
        copied: Parameters of which there are FP8 copies, where the weights themselves are not FP8.
        precision: The job's.
    """
    copies = 0 if precision.fp8 == "off" or precision.fp8_params else int(FP8_COPIES * copied)
    return GEMM_WORKSPACES + 2 * empty + copies
