"""From what a job says of its data to each rank's micro-batches.

Chat files are prepared into a store by rank 0 while the others wait; from there on all ranks do the
same: pack the store's samples by their lengths, and read the rows that are theirs.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dsv3.commands.resume import Progress
from megatron_dsv3.config.job import Job
from megatron_dsv3.config.sections import DataSection, ValidationSection
from megatron_dsv3.data.batch import Batch, pack_batch
from megatron_dsv3.data.dataset import (
    Documents,
    RowOptions,
    Rows,
    global_batches,
    rank_micro_batches,
)
from megatron_dsv3.data.fingerprints import template_fingerprint, tokenizer_fingerprint
from megatron_dsv3.data.manifest import Recipe, read_manifest
from megatron_dsv3.data.own_template import choose_template
from megatron_dsv3.data.pipeline import SampleOptions
from megatron_dsv3.data.prepare import PrepareOptions, is_current, prepare
from megatron_dsv3.data.prepare import Progress as Reading
from megatron_dsv3.data.sources import find_inputs
from megatron_dsv3.data.store import Store
from megatron_dsv3.model.groups import Groups, from_rank_0, raise_together
from megatron_dsv3.train.loop import StepBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DEFAULT_TEMPLATE = "deepseek_v3"
_BYTES_FOR_ONE_PROCESS = 8 << 20
"""Of chat files: fewer are prepared before other processes would have started."""
_SECONDS_BETWEEN_LINES = 60
Tell = Callable[[str], None]


def data_problems(job: Job, tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """What is wrong with the job's data, as far as can be told without reading them."""
    sections: tuple[tuple[str, DataSection | ValidationSection], ...] = (
        ("data", job.data),
        ("validation", job.validation),
    )
    problems = []
    for name, section in sections:
        try:
            if section.store is not None:
                recipe = _manifest_recipe(section.store)
                problems += _store_problems(f"{name}.store {section.store}", recipe, job, tokenizer)
            elif section.paths:
                find_inputs(section.paths)
                choose_template(job.data.template or DEFAULT_TEMPLATE, tokenizer)
        except (ValueError, OSError) as error:
            problems.append(f"{name}: {error}")
    return problems


def _manifest_recipe(store: Path) -> Recipe:
    manifest = read_manifest(store)
    if manifest is None:
        raise ValueError(
            f"{store}: no complete store there; write one with `megatron-dsv3 prepare`, or give "
            "the chat files as paths"
        )
    return manifest.recipe


def _store_problems(
    which: str, recipe: Recipe, job: Job, tokenizer: "PreTrainedTokenizerFast"
) -> list[str]:
    problems = []
    ours = tokenizer_fingerprint(tokenizer)
    if recipe.tokenizer != ours:
        problems.append(
            f"{which}: made with the tokenizer {recipe.tokenizer[:12]}, but that of "
            f"{job.model.hf_dir} is {ours[:12]}; prepare it again with --model {job.model.hf_dir}"
        )
    wanted = job.data.template or recipe.template
    if wanted != recipe.template:
        problems.append(
            f"{which}: made with the template {recipe.template}, but data.template is {wanted}; "
            "prepare it again, or leave data.template out"
        )
    elif (fingerprint := template_fingerprint(choose_template(wanted, tokenizer))) != (
        recipe.template_fingerprint
    ):
        problems.append(
            f"{which}: made with the template {wanted} as it was "
            f"({recipe.template_fingerprint[:12]}), but it has changed since ({fingerprint[:12]}); "
            "prepare it again"
        )
    made = recipe.options.get("history_reasoning")
    if made != (job.data.history_reasoning or made):
        problems.append(
            f"{which}: made with --history-reasoning {made}, but data.history_reasoning is "
            f"{job.data.history_reasoning}; prepare it again, or leave data.history_reasoning out"
        )
    return problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """The job's rows, the same on every rank, and this rank's part of them."""

    job: Job
    num_mtp: int
    pad_id: int
    train: Rows
    validation: Rows | None

    @property
    def num_steps(self) -> int:
        """Optimizer steps: all epochs, or as many as the job allows."""
        section = self.job.train
        steps = math.ceil(len(self.train) * section.num_epochs / section.global_batch_size)
        return min(steps, section.num_steps or steps)

    @property
    def identity(self) -> dict[str, int | str]:
        """What is trained on, by its content; two runs of one training agree in it."""
        report = self.train.report
        return {
            "samples": report.samples,
            "tokens": report.tokens,
            "counted_tokens": report.counted_tokens,
            "document_multiple": self.job.document_multiple,
            "rows": self.train.fingerprint,
        }

    def batches(self, groups: Groups, done: Progress) -> Iterator[StepBatch]:
        """This data-parallel rank's part of every global batch that is left."""
        section, num_rows = self.job.train, len(self.train)
        steps = global_batches(
            num_rows,
            global_batch_size=section.global_batch_size,
            seed=section.seed,
            num_epochs=section.num_epochs,
            position=done.position,
        )
        for _, batch in zip(range(self.num_steps - done.step), steps, strict=False):
            yield StepBatch(
                micro_batches=self._micro_batches(self.train, batch.rows, groups),
                epoch=batch.after.epoch + batch.after.sample / num_rows,
                after=batch.after,
            )

    def validation_batches(self, groups: Groups) -> list[Batch]:
        """This rank's part of the validation set, which is one global batch."""
        if self.validation is None:
            return []
        parallel = self.job.parallel
        # Virtual stages take micro-batches in rounds of as many as there are stages.
        round_size = parallel.pp_size if parallel.vpp_size > 1 else 1
        size = self.job.train.micro_batch_size * groups.dp_size * round_size
        num_rows = len(self.validation)
        padded = math.ceil(num_rows / size) * size
        [whole] = global_batches(num_rows, global_batch_size=padded, seed=0, num_epochs=1)
        return self._micro_batches(self.validation, whole.rows, groups)

    def _micro_batches(
        self, rows: Rows, numbers: Sequence[int | None], groups: Groups
    ) -> list[Batch]:
        mine = rank_micro_batches(
            numbers,
            micro_batch_size=self.job.train.micro_batch_size,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
        )
        return [self.to_batch([() if n is None else rows[n] for n in micro]) for micro in mine]

    def to_batch(self, rows: Sequence[Documents]) -> Batch:
        """The tensors of a micro-batch.

        Unpacked rows are padded to the longest of them; but pipeline stages, and ranks that gather
        each other's tokens, exchange rows of one length for all.
        """
        job, depth, pad_id = self.job, self.num_mtp, self.pad_id
        length = job.data.seq_length
        if job.data.packed:
            multiple = job.document_multiple
            return pack_batch(
                rows, row_length=length, multiple=multiple, num_mtp=depth, pad_id=pad_id
            )
        if job.parallel.pp_size == 1 and job.experts.dispatcher != "allgather":
            longest = max([1, *(len(sample.tokens) for row in rows for sample in row)])
            length = math.ceil(longest / job.row_multiple) * job.row_multiple
        return pack_batch(rows, row_length=length, multiple=length, num_mtp=depth, pad_id=pad_id)


def open_feed(
    job: Job, tokenizer: "PreTrainedTokenizerFast", groups: Groups, tell: Tell, *, num_mtp: int
) -> Feed:
    """Collective. Prepares what is not prepared, and packs.

    Args:
        job: Found fit by `data_problems`.
        tokenizer: Of the model.
        groups: This rank's place.
        tell: Takes a line for the user.
        num_mtp: Further tokens to predict.

    Raises:
        SharedError: On every rank.
    """
    stores = from_rank_0(lambda: _stores(job, tokenizer, tell))
    options = RowOptions(
        length=job.data.seq_length,
        packed=job.data.packed,
        multiple=job.document_multiple,
        too_long=job.data.too_long,
        seed=job.train.seed,
    )
    rows: list[Rows] = []
    problem = ""
    try:
        rows = [Rows(Store(store), options) for store in stores]
    except (ValueError, OSError) as error:
        problem = str(error)
    raise_together(problem)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Feed(
        job=job,
        num_mtp=num_mtp,
        pad_id=pad_id,
        train=rows[0],
        validation=rows[1] if len(rows) > 1 else None,
    )


def _stores(job: Job, tokenizer: "PreTrainedTokenizerFast", tell: Tell) -> list[Path]:
    """The stores to train on and to validate on, whole."""
    stores = []
    sections: tuple[DataSection | ValidationSection, ...] = (job.data, job.validation)
    for name, section in zip(("train", "validation"), sections, strict=True):
        if section.store is not None:
            _check_store(section.store, job, tell)
            stores.append(section.store)
        elif section.paths:
            stores.append(_prepared(job, section.paths, job.cache_dir / name, tokenizer, tell))
    return stores


def _check_store(directory: Path, job: Job, tell: Tell) -> None:
    store = Store(directory)
    store.check_hashes()
    options = store.manifest.recipe.options
    longest = options.get("seq_length")
    if isinstance(longest, int) and longest < job.data.seq_length:
        tell(
            f"data: {directory} was prepared with --seq-length {longest}, so it holds none of the "
            f"longer samples that would fit data.seq_length {job.data.seq_length}"
        )


def _prepared(
    job: Job,
    paths: Sequence[Path],
    target: Path,
    tokenizer: "PreTrainedTokenizerFast",
    tell: Tell,
) -> Path:
    data = job.data
    options = PrepareOptions(
        template=data.template or DEFAULT_TEMPLATE,
        samples=SampleOptions(
            seq_length=data.seq_length,
            too_long=data.too_long,
            history_reasoning=data.history_reasoning or "strip",
        ),
        on_bad_row=data.on_bad_row,
        replace=True,
    )
    if is_current(target, paths, tokenizer=tokenizer, options=options) and _is_whole(target, tell):
        tell(f"data: {target} is prepared already")
        return target
    files = find_inputs(paths).files
    size = sum(file.stat().st_size for file in files)
    if size < _BYTES_FOR_ONE_PROCESS:
        options = replace(options, num_workers=1)
    tell(f"data: preparing {len(files):,} files of {size / 1e6:,.1f} MB as {target}")
    report = prepare(
        paths, target, tokenizer=tokenizer, options=options, on_progress=_now_and_then(tell)
    )
    samples = report.samples
    tell(
        f"data: {report.rows.read:,} rows into {samples.kept:,} samples, "
        f"{sum(samples.dropped.values()):,} dropped, {samples.truncated:,} truncated; "
        f"report in {target / 'report'}"
    )
    return target


def _is_whole(target: Path, tell: Tell) -> bool:
    try:
        Store(target).check_hashes()
    except ValueError as error:
        tell(f"data: prepared anew: {error}")
        return False
    return True


def _now_and_then(tell: Tell) -> Callable[[Reading], None]:
    """Tells how far the preparing is; other ranks wait for it, perhaps for hours."""
    began = told = time.monotonic()

    def on_progress(done: Reading) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told < _SECONDS_BETWEEN_LINES or not done.num_read:
            return
        told, seconds = now, now - began
        tell(
            f"data: {done.num_read / done.size:.0%} read, {done.rows:,} rows, "
            f"{done.rows / seconds:,.0f} rows/s, "
            f"{seconds * (done.size / done.num_read - 1):,.0f} s left"
        )

    return on_progress
