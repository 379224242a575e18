"""`megatron-dsv3 train`: from a job to a fine-tuned Hugging Face directory."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from megatron_dsv3.commands import plan_job
from megatron_dsv3.commands.assemble import Engine, build_engine, build_model, write_model
from megatron_dsv3.commands.feed import Feed, data_problems, open_feed
from megatron_dsv3.commands.keeping import keep
from megatron_dsv3.commands.resume import Identity, Progress, find_checkpoint, resume
from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.counts import document_flops
from megatron_dsv3.config.devices import peak_bf16_tflops
from megatron_dsv3.config.job import Job, to_yaml
from megatron_dsv3.config.placement import mtp_stage, place, stage_costs
from megatron_dsv3.convert.hf_io import HFReader, check_target
from megatron_dsv3.data.fingerprints import tokenizer_fingerprint
from megatron_dsv3.data.tokens import load_tokenizer
from megatron_dsv3.model import cpu
from megatron_dsv3.model.groups import Groups, RankError, SharedError, device_of, start, stop
from megatron_dsv3.serve.hf_check import check_export
from megatron_dsv3.train.loop import Run, train
from megatron_dsv3.train.metrics import FileSink, LineSink, Sink, StepRecord
from megatron_dsv3.train.progress import ProgressSink
from megatron_dsv3.train.sinks import TrackedRun, start_trackers, tracker_problems
from megatron_dsv3.train.step import Counts, Losses, TrainStep
from megatron_dsv3.train.watchdog import watchdog

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a job names, read and found fit; nothing has been started or written."""

    job: Job
    checkpoint: Architecture
    """Of the files."""
    reader: HFReader
    tokenizer: "PreTrainedTokenizerFast"

    @property
    def arch(self) -> Architecture:
        """Of the model that is trained: without MTP, where the job leaves it out."""
        if self.job.mtp.mode == "off":
            return replace(self.checkpoint, num_mtp_layers=0)
        return self.checkpoint

    def open_feed(self, groups: Groups, console: Console) -> Feed:
        """Collective. The job's data, prepared where they are not yet."""
        num_mtp = self.arch.num_mtp_layers
        tell = teller(console, groups)
        return open_feed(self.job, self.tokenizer, groups, tell, num_mtp=num_mtp)

    def identity(self, feed: Feed) -> Identity:
        """By which a checkpoint of this training is known."""
        fingerprint = tokenizer_fingerprint(self.tokenizer)
        return Identity(self.job, self.arch, fingerprint, feed.identity)


@dataclass(frozen=True, slots=True)
class Trained:
    """The model at the end, still in its processes."""

    chunks: Sequence[nn.Module]
    """Unwrapped."""
    groups: Groups
    records: Sequence[StepRecord]


def run(job: Job, console: Console, *, on_end: Sequence[Callable[[Trained], None]] = ()) -> None:
    """Trains and writes the Hugging Face directory.

    Args:
        job: What to do.
        console: Of rank 0; the other ranks say nothing.
        on_end: Called on every rank with the trained model, before it is written.

    Raises:
        ValueError: Before anything is started or written, where the job cannot work.
    """
    check_target(job.output.dir)
    inputs = read_inputs(job, int(os.environ.get("WORLD_SIZE", "1")), device_for(job))
    with session(inputs) as groups:
        _train_and_write(inputs, groups, console, on_end)


def device_for(job: Job) -> torch.device:
    """This process's device, set up for the job's precision."""
    if job.precision.compute == "fp32":
        # Read when CUDA starts. Transformer Engine multiplies fp32 in TF32 otherwise (3e-4 off).
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    return device_of(job.train.device)


@contextmanager
def session(inputs: Inputs) -> Iterator[Groups]:
    """The job's process groups; an error of one rank leaves it with that rank's name."""
    job, device = inputs.job, device_for(inputs.job)
    if device.type == "cpu":
        cpu.enable()
    stages = place(inputs.arch, job.parallel)
    groups = start(job.parallel, device, seed=job.train.seed, mtp_stage=mtp_stage(stages))
    try:
        yield groups
    except SharedError:
        raise
    except ValueError as error:
        raise RankError(f"rank {groups.rank}: {error}") from error
    finally:
        stop()


def read_inputs(job: Job, world_size: int, device: torch.device) -> Inputs:
    """Reads and checks everything that a job names.

    Raises:
        ValueError: With every problem that can be found without starting.
    """
    arch = Architecture.from_hf(job.model.hf_dir)
    problems = job.problems(arch, world_size)
    problems += job.backend_problems("cuda" if device.type == "cuda" else "cpu")
    problems += tracker_problems(
        wandb_project=job.log.wandb_project, mlflow_experiment=job.log.mlflow_experiment
    )
    try:
        tokenizer = load_tokenizer(job.model.hf_dir)
        problems += data_problems(job, tokenizer)
    except (ValueError, OSError) as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    reader = HFReader(job.model.hf_dir)
    reader.check_against(arch)
    return Inputs(job, arch, reader, tokenizer)


def _train_and_write(
    inputs: Inputs,
    groups: Groups,
    console: Console,
    on_end: Sequence[Callable[[Trained], None]],
) -> None:
    job = inputs.job
    tell = teller(console, groups)
    feed = inputs.open_feed(groups, console)
    planning = plan_job.begin(job, groups)
    bridge = build_model(job, inputs.arch, groups, checkpoint=inputs.checkpoint)
    found = find_checkpoint(job, groups, tell)
    if found.path is None:
        bridge.load(inputs.reader)
    engine = build_engine(job, bridge, num_steps=feed.num_steps)
    if job.train.verify_first and found.path is None:
        _verify_first(feed, engine, console)
    identity = inputs.identity(feed)
    done = resume(engine, found, identity, tell)
    planned = plan_job.finish(planning, tell)
    records = _train(inputs, feed, identity, engine, done, console)
    plan_job.tell_peaks(planned, groups, tell)
    for callback in on_end:
        callback(Trained(bridge.chunks, groups, records))
    drift = engine.step.experts.drift()
    write_model(bridge, job, inputs.reader, job.output.dir)
    tell(f"wrote {job.output.dir}")
    if groups.rank == 0:
        for line in check_export(job.output.dir):
            tell(line)
        tell(_report_drift(drift, job.log_dir / "expert_bias_drift.json"))


def _report_drift(drift: Mapping[int, float], path: Path) -> str:
    """What the experts' biases have become since they were loaded: one line, and all in a file."""
    layer = max(drift, key=drift.__getitem__, default=None)
    if layer is None or drift[layer] == 0:
        return "experts' biases: as loaded"
    content = {"layers": list(drift), "largest_change": list(drift.values())}
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    return (
        f"experts' biases: moved by at most {drift[layer]:.2e} since they were loaded "
        f"(layer {layer}); every layer in {path}"
    )


def _verify_first(feed: Feed, engine: Engine, console: Console) -> None:
    # Imported here: the reference brings transformers' models, seconds for nothing otherwise.
    from megatron_dsv3.commands.gate import check_parity

    job = feed.job
    check_parity(
        engine.step,
        engine.bridge,
        feed.train.store,
        job=job,
        hf_dir=job.model.hf_dir,
        console=console,
    )


def _train(
    inputs: Inputs,
    feed: Feed,
    identity: Identity,
    engine: Engine,
    done: Progress,
    console: Console,
) -> list[StepRecord]:
    job, groups = inputs.job, engine.bridge.groups
    tell = teller(console, groups)
    with ExitStack() as stack:
        dog = stack.enter_context(watchdog(job.log_dir, groups.rank, job.train.hang_timeout_s))
        keeping = stack.enter_context(keep(engine, identity, dog, inputs.reader, tell))
        loop = Run(
            step=engine.step,
            schedule=engine.schedule,
            optimizer=engine.optimizer,
            groups=groups,
            num_steps=feed.num_steps,
            flops=partial(_flops, inputs.arch),
            max_lr=job.optimizer.lr,
            peak_tflops=_peak_tflops(groups.device),
            validate=_validation(feed, engine.step, groups),
            validate_every_steps=job.validation.every_steps,
            expert_load_every_steps=job.log.expert_load_every_steps,
            sinks=_sinks(inputs, feed, groups, console),
            first_step=done.step + 1,
            on_step=keeping,
        )
        return train(loop, feed.batches(groups, done))


def teller(console: Console, groups: Groups) -> Callable[[str], None]:
    """For what one line says to the user; rank 0 speaks."""

    def tell(line: str) -> None:
        if groups.rank == 0:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    return tell


def _flops(arch: Architecture, counts: Counts) -> float:
    return document_flops(arch, num_tokens=counts.tokens, num_squares=counts.squares)


def _peak_tflops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return peak_bf16_tflops(torch.cuda.get_device_name(device))


def _validation(feed: Feed, step: TrainStep, groups: Groups) -> Callable[[], Losses] | None:
    """The validation set as one global batch, made once."""
    batches = feed.validation_batches(groups)
    return partial(step.evaluate, batches) if batches else None


def _sinks(inputs: Inputs, feed: Feed, groups: Groups, console: Console) -> list[Sink]:
    if groups.rank != 0:
        return []
    job, report = inputs.job, feed.train.report
    console.print(to_yaml(job), markup=False, highlight=False)
    lost = f"{report.too_long:,} too long and dropped"
    if report.truncated or report.without_counted:
        lost = f"{report.truncated:,} truncated, {report.without_counted:,} without a counted token"
    teller(console, groups)(
        f"{report.samples:,} samples, {lost}; {report.tokens:,} tokens, "
        f"{report.counted_tokens:,} with loss; {report.rows:,} rows of {job.data.seq_length:,}, "
        f"{report.fill:.2%} full; {feed.num_steps:,} steps on {groups.world_size} processes"
    )
    console.print(stage_table(inputs))
    bar = ProgressSink(console, feed.num_steps)
    lines = LineSink(teller(console, groups), every_steps=job.log.every_steps)
    files = FileSink(job.log_dir)  # makes the directory that the trackers write to, too
    trackers = start_trackers(
        TrackedRun(job.output.dir.name, job.model_dump(mode="json"), job.log_dir),
        wandb_project=job.log.wandb_project,
        mlflow_experiment=job.log.mlflow_experiment,
    )
    return [files, lines, bar, *trackers]


def stage_table(inputs: Inputs) -> Table:
    """Which layers are where, and each chunk's share of the work relative to an even one."""
    job = inputs.job
    stages = place(inputs.arch, job.parallel)
    costs = stage_costs(inputs.arch, stages, job.data.seq_length)
    table = Table("stage", "chunk", "embedding", "layers", "MTP", "loss", "work", title="Placement")
    for stage, cost in zip(stages, costs, strict=True):
        layers = f"{stage.layers[0]}-{stage.layers[-1]}" if stage.layers else "-"
        marks = [
            "yes" if mark else "-"
            for mark in (stage.has_embedding, stage.mtp_layers, stage.has_loss)
        ]
        table.add_row(
            *(str(stage.pp_rank), str(stage.vpp_rank), marks[0], layers, marks[1], marks[2]),
            f"{cost * len(stages):.2f}",
        )
    return table
