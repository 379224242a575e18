"""What happens between two steps besides training: checkpoints, exports, signals, the watchdog."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_dsv3.checkpoint.saver import Saver
from megatron_dsv3.commands.assemble import Engine, write_model
from megatron_dsv3.commands.resume import Identity, own_state
from megatron_dsv3.config.durable import write_durably
from megatron_dsv3.convert.hf_io import HFReader
from megatron_dsv3.model.groups import SharedError
from megatron_dsv3.train.loop import StepBatch
from megatron_dsv3.train.metrics import StepRecord
from megatron_dsv3.train.signals import Requeue, noted
from megatron_dsv3.train.watchdog import Watchdog

OnStep = Callable[[StepRecord, StepBatch], None]
REQUEUE_FILE = "requeue"
"""In the checkpoints' folder while a run waits to be started again; torchrun hides exit codes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeper:
    """Saves; called on every rank after each step."""

    engine: Engine
    identity: Identity
    saver: Saver
    every_steps: int
    tell: Callable[[str], None]

    def __call__(self, record: StepRecord, batch: StepBatch) -> None:
        """Saves where that is due, and ends the run where a signal asks for it.

        Raises:
            Requeue: On every rank, once the state is saved.
            SaveError: On every rank, where the job says that a failed save ends the run.
        """
        is_last = record.step == record.num_steps
        stop = self.engine.step.stop_request.agreed and not is_last
        if stop or is_last or record.step % self.every_steps == 0:
            self.engine.step.settle()
            own = own_state(self.identity, self.engine, batch.after)
            self.saver.save(record.step, own, wait=stop)
        else:
            self.saver.poll()
        if stop:
            self._leave(record.step)

    def _leave(self, step: int) -> None:
        self.saver.finish()
        if self.engine.bridge.groups.rank == 0:
            name = self.engine.step.stop_request.received or "a signal to another rank"
            self.tell(f"{name}: stopped after step {step}, to be started again")
            try:
                write_durably(self.saver.folder / REQUEUE_FILE, f"{step}\n")
            except OSError as error:
                self.tell(f"{self.saver.folder / REQUEUE_FILE} not written: {error}")
        dist.barrier()
        raise Requeue


@dataclass(frozen=True, slots=True, kw_only=True)
class Exporter:
    """Writes Hugging Face directories during the run; called on every rank after each step."""

    engine: Engine
    every_steps: int
    watchdog: Watchdog
    write: Callable[[int], None]
    """Collective: writes the model after a step."""

    def __call__(self, record: StepRecord, _: StepBatch) -> None:
        """Exports where that is due; the one after the last step is not this one's."""
        if record.step % self.every_steps == 0 and record.step < record.num_steps:
            self.watchdog.pause()  # terabytes may take longer than a step ever may
            self.engine.step.settle()
            self.write(record.step)


@contextmanager
def keep(
    engine: Engine,
    identity: Identity,
    watchdog: Watchdog,
    reader: HFReader,
    tell: Callable[[str], None],
) -> Iterator[list[OnStep]]:
    """What the job asks for after each step, as callbacks of the loop.

    A save that is under way when the loop ends is waited for.

    Args:
        engine: What trains.
        identity: Of the run.
        watchdog: Told of every step.
        reader: Of the model that training started from.
        tell: Takes a line for the user.
    """
    job, groups = identity.job, engine.bridge.groups
    section = job.checkpoint

    def progress(*_: object) -> None:
        watchdog.progress()

    def export(step: int) -> None:
        directory = Path(f"{job.output.dir}-step{step}")
        there = [directory.exists()]
        dist.broadcast_object_list(there, src=0)
        if not there[0]:  # else from before a stop: the same again
            write_model(engine.bridge, job, reader, directory)
            tell(f"wrote {directory}")

    exporters: list[OnStep] = []
    if section.export_hf_every_steps is not None:
        every = section.export_hf_every_steps
        exporters = [Exporter(engine=engine, every_steps=every, watchdog=watchdog, write=export)]
    if section.every_steps is None:
        yield [progress, *exporters, progress]
        return
    if groups.rank == 0:
        with suppress(OSError):  # a folder that cannot be written to is the first save's matter
            (job.checkpoint_dir / REQUEUE_FILE).unlink()
    saver = Saver(engine.trainee, job.checkpoint_dir, section, tell)
    with noted(engine.step.stop_request):
        keeper = Keeper(
            engine=engine,
            identity=identity,
            saver=saver,
            every_steps=section.every_steps,
            tell=tell,
        )
        try:
            yield [progress, keeper, *exporters, progress]
        except SharedError:
            saver.finish()  # the error is the run's, not that of the save under way
            raise
        watchdog.pause()
        saver.finish()
