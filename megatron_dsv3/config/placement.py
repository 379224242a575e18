"""Which layers live on which pipeline stage, as rows of data."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.parallel import Parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One model chunk: what the rank `pp_rank` of the pipeline holds as its chunk `vpp_rank`."""

    pp_rank: int
    vpp_rank: int
    has_embedding: bool
    layers: tuple[int, ...]
    """Decoder layers, counted over the whole model."""
    mtp_layers: tuple[int, ...]
    """MTP layers, counted from 0; MTP layer 0 is `model.layers.{num_layers}` in Hugging Face's
    names."""
    has_loss: bool
    """Whether the final norm, the head and the loss are here."""


def place(arch: Architecture, parallel: Parallel) -> list[Stage]:
    """All chunks in the order in which a token passes them: chunk c = vpp_rank * pp_size + pp_rank.

    Decoder layers are spread evenly by number. MTP stays with the loss: on another chunk than the
    head, the gradient of the embedding would not be reduced among all that hold it.

    Raises:
        ValueError: More chunks than layers, or chunks without a pipeline.
    """
    if problems := parallel.depth_problems(arch):
        raise ValueError("; ".join(problems))
    stages, first = [], 0
    for chunk, num_layers in enumerate(_num_layers(arch.num_layers, parallel.num_chunks)):
        is_last = chunk == parallel.num_chunks - 1
        stages.append(
            Stage(
                pp_rank=chunk % parallel.pp_size,
                vpp_rank=chunk // parallel.pp_size,
                has_embedding=chunk == 0,
                layers=tuple(range(first, first + num_layers)),
                mtp_layers=tuple(range(arch.num_mtp_layers)) if is_last else (),
                has_loss=is_last,
            )
        )
        first += num_layers
    return stages


def mcore_layout(stages: Sequence[Stage]) -> list[list[str]]:
    """The same in Megatron-Core's words, for `pipeline_model_parallel_layout`."""
    return [
        ["embedding"] * stage.has_embedding
        + ["decoder"] * len(stage.layers)
        + ["mtp"] * len(stage.mtp_layers)
        + ["loss"] * stage.has_loss
        for stage in stages
    ]


def _num_layers(num_layers: int, num_chunks: int) -> list[int]:
    """Layers of each chunk; they differ by at most one.

    The chunks in the middle are the first to get one more, the last chunk, with MTP and the head,
    is the last.
    """
    base, left_over = divmod(num_layers, num_chunks)
    by_load = [*range(1, num_chunks - 1), 0, num_chunks - 1]
    fuller = set(by_load[:left_over])
    return [base + (chunk in fuller) for chunk in range(num_chunks)]
