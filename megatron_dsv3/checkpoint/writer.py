"""Writes a sharded state in Megatron-Core's format: planned together, written by each rank alone.

Megatron-Core plans and writes; the end of a save is ours. Its own raises on one rank where a disk
is full while the others wait in a collective, and it hands results over through a process that
outlives a killed run. Here every rank learns of every problem, and nothing is left running.
"""

import ctypes
import os
import pickle
import queue
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_dsv3.checkpoint.directory import OPTIMIZER_FILES, commit, incomplete_name
from megatron_dsv3.checkpoint.manifest import write_manifest, write_part
from megatron_dsv3.model.groups import Groups, SharedError, raise_together


class SaveError(SharedError):
    """A checkpoint could not be written; those before it are as they were. On every rank alike."""


class _Results:
    """What a writer process tells its parent, in memory that both see and that dies with them."""

    def __init__(self) -> None:
        self.memory = os.fdopen(os.memfd_create("checkpoint-results"), "w+b")

    def put(self, results: Any) -> None:
        self.clear()
        pickle.dump(results, self.memory)
        self.memory.flush()

    def get_nowait(self) -> Any:
        self.memory.seek(0)
        content = self.memory.read()
        if not content:
            raise queue.Empty
        self.clear()
        return pickle.loads(content)

    def clear(self) -> None:
        self.memory.seek(0)
        self.memory.truncate()


class _Strategy(TorchDistSaveShardedStrategy):
    """Keeps what the plan gave, for the end of the save."""

    planned: tuple[FileSystemWriterAsync, Metadata | None]

    def _get_save_and_finalize_callbacks(
        self, writer: Any, save_state_dict_ret: Any, async_strategy: str
    ) -> Any:
        self.planned = writer, save_state_dict_ret[1]
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret, async_strategy)


def plan_save(
    state: Mapping[str, Any],
    folder: Path,
    *,
    step: int,
    groups: Groups,
    content_metadata: Mapping[str, Any],
) -> AsyncRequest:
    """Collective. Makes the directory and the plan; the request writes when it is run.

    Its last function gives the checkpoint its name, on all ranks or on none.

    Args:
        state: Megatron-Core's sharded state dict; tensors are read when the request is started.
        folder: Of the run's checkpoints.
        step: After which the state is.
        groups: This rank's place.
        content_metadata: How the state was made, for Megatron-Core's own loading.

    Raises:
        SaveError: The folder cannot be written to.
    """
    incomplete = _make_directory(folder, step, groups)
    # Set here once, because Megatron-Core would start a manager process for its queue of results:
    # it costs seconds, imports the main script again, and stays when this process is killed.
    if not isinstance(filesystem_async._results_queue, _Results):
        filesystem_async._results_queue = _Results()
    filesystem_async._results_queue.clear()
    # One file for the weights and one for the optimizer, so that the latter can be dropped.
    strategy = _Strategy(thread_count=2, separation_hint=OPTIMIZER_FILES)
    request = dist_checkpointing.save(
        dict(state),
        str(incomplete),
        # Replicas share the work of writing.
        FullyParallelSaveStrategyWrapper(strategy, groups.collection.dp_cp),
        async_sharded_save=True,
        async_strategy="mcore",
        content_metadata=dict(content_metadata),
    )
    writer, metadata = strategy.planned
    if metadata is not None:
        forget_pinning(metadata)
    transforms = [writer.transforms] if hasattr(writer, "transforms") else []
    write = partial(_write, transforms, incomplete, os.getpid())
    end = partial(_finish, writer, metadata, incomplete, step, groups)
    return request._replace(async_fn=write, finalize_fns=[end])


def forget_pinning(metadata: Metadata) -> None:
    """On their way from a GPU tensors are in pinned memory, which is no property of theirs.

    torch's own tools would allocate such memory for them, where there may be no GPU.
    """
    for stored in metadata.state_dict_metadata.values():
        if isinstance(stored, TensorStorageMetadata):
            stored.properties.pin_memory = False


def _make_directory(folder: Path, step: int, groups: Groups) -> Path:
    """Every rank looks, because a mount may be gone on one node only."""
    names = [incomplete_name(step)]
    dist.broadcast_object_list(names, src=0)
    incomplete, problem = folder / names[0], ""
    if groups.rank == 0:
        problem = _problem_of(partial(incomplete.mkdir, parents=True))
    raise_save_error(problem, step)
    if not os.access(incomplete, os.W_OK | os.X_OK):
        problem = f"{incomplete}: this rank cannot write there"
    raise_save_error(problem, step)
    return incomplete


def _write(
    transforms: list[Any],
    directory: Path,
    parent: int,
    rank: int | None = None,
    buckets: Sequence[Any] = (),
    results: _Results | None = None,
) -> None:
    """Runs in the writer process of an asynchronous save, or here; one bucket is one file."""
    if os.getpid() != parent:
        _die_with(parent)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's to answer
        os.nice(10)
    if rank is None or results is None:  # this rank has nothing to write
        return None
    written = {}
    for number, bucket in enumerate(buckets):
        outcome = FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, None, None, use_fsync=True
        )[1]
        if isinstance(outcome, Exception):
            return results.put(RuntimeError(_explained(outcome, directory)))
        written[number] = outcome
    names = [name for _, name, _ in buckets]
    if problem := _problem_of(partial(write_part, directory, names, rank)):
        return results.put(RuntimeError(problem))
    return results.put(written)


def _explained(error: BaseException, directory: Path) -> str:
    """torch's archive writer covers a full disk's error by one of its own, about positions."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    shown = cause or error
    try:
        free = f"; {shutil.disk_usage(directory).free / 1e9:.3f} GB free there"
    except OSError:
        free = ""
    return f"{directory}: {type(shown).__name__}: {shown}{free}"


def _die_with(parent: int) -> None:
    """A writer whose run was killed would go on filling the disk beside the next run."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # killed before the line above
        os._exit(1)


def _finish(
    writer: FileSystemWriterAsync,
    metadata: Metadata | None,
    incomplete: Path,
    step: int,
    groups: Groups,
) -> None:
    """Collective: checks every rank's writing, then rank 0 completes and names the checkpoint.

    Raises:
        SaveError: On every rank, with the problems of all.
    """
    results = writer.retrieve_write_results()
    # torch wraps an exception as (exception, where); a list is what was written.
    problem = str(results[0]).removeprefix("Worker failure: ") if isinstance(results, tuple) else ""
    raise_save_error(problem, step)
    everyones: list[Any] = [None] * groups.world_size
    dist.gather_object(results, everyones if groups.rank == 0 else None)
    if groups.rank == 0:
        problem = _problem_of(partial(_complete, writer, metadata, everyones, incomplete, step))
    raise_save_error(problem, step)


def _complete(
    writer: FileSystemWriterAsync,
    metadata: Metadata | None,
    results: list[Any],
    incomplete: Path,
    step: int,
) -> None:
    writer.finish(metadata, results)
    save_config(CheckpointingConfig("torch_dist", 1), str(incomplete))
    write_manifest(incomplete)
    commit(incomplete, step)


def _problem_of(action: Callable[[], object]) -> str:
    try:
        action()
    except (OSError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def raise_save_error(problem: str, step: int) -> None:
    """Collective. Raises SaveError on every rank, if any rank has a problem; "" is none."""
    try:
        raise_together(problem)
    except SharedError as error:
        raise SaveError(f"checkpoint of step {step}: {error}") from None
