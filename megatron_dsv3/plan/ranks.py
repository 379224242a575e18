"""This process as any rank of a world that is not there, to build what that rank would hold."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed._tools import fake_collectives  # noqa: F401 - collectives on meta tensors
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.model import cpu
from megatron_dsv3.model.groups import Groups, start, stop

META = torch.device("meta")


@contextmanager
def as_rank(
    parallel: Parallel, rank: int, world_size: int, *, mtp_stage: int | None = None
) -> Iterator[Groups]:
    """Process groups of this layout in which nothing is sent; "cuda" is the meta device inside.

    Raises:
        ValueError: The layout does not fit the world.
    """
    assert not dist.is_initialized()
    cpu.enable()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    groups = start(parallel, META, mtp_stage=mtp_stage)
    try:
        with cpu.on_meta():
            yield groups
    finally:
        stop()


def rank_of_stage(pp_rank: int, parallel: Parallel, world_size: int) -> int:
    """The first rank of a pipeline stage: stages are the outermost order of ranks.

    Ranks of a stage hold tensors of equal shapes, and none more than the first: what does not
    divide goes to the first ones.
    """
    return pp_rank * (world_size // parallel.pp_size)
