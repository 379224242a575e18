r"""Files of conversations to a store of tokenised samples and a report.

    files --sources--> items --workers: pipeline--> samples --> store
                                                \-> counts --> report

Everything is streamed and kept in the order of the input, so that the same input gives the same
store with any number of workers. The store appears under its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dsv3.data.fingerprints import template_fingerprint, tokenizer_fingerprint
from megatron_dsv3.data.manifest import Recipe, read_manifest
from megatron_dsv3.data.manifest import Source as SourceRecord
from megatron_dsv3.data.own_template import OwnTemplate, choose_template
from megatron_dsv3.data.pipeline import TOO_LONG, Block, OnBadRow, Pipeline, SampleOptions
from megatron_dsv3.data.report import Account, FileAccount, Report
from megatron_dsv3.data.report_files import write_report
from megatron_dsv3.data.rows import Item
from megatron_dsv3.data.sources import Inputs, Source, find_inputs
from megatron_dsv3.data.store import StoreWriter
from megatron_dsv3.data.templates import ChatTemplate
from megatron_dsv3.data.tokens import Vocabulary
from megatron_dsv3.data.workers import num_cpus, run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """What to make of the files, and how."""

    template: str
    """A built-in one, or `tokenizer` for the tokenizer's own."""
    samples: SampleOptions
    on_bad_row: OnBadRow = "error"
    """skip: leave out what cannot be read, count it, and say why."""
    num_workers: int | None = None
    """Processes that tokenise; None: one a CPU."""
    replace: bool = False
    """Whether a complete store of that name may be replaced."""
    seed: int = 0
    """Of the packing that the report foresees."""

    def __post_init__(self) -> None:
        if self.on_bad_row not in ("error", "skip"):
            raise ValueError(f"on_bad_row: expected error or skip, got {self.on_bad_row!r}")
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"num_workers: expected at least 1, got {self.num_workers}")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    rows: int
    num_read: int
    """Bytes of the input files, as stored."""
    size: int
    """Of all of them."""


def prepare(
    paths: Sequence[Path | str],
    target: Path,
    *,
    tokenizer: PreTrainedTokenizerFast,
    options: PrepareOptions,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Report:
    """Writes the store `target` with its report inside.

    Args:
        paths: Files, directories, patterns.
        target: Where the store will be.
        tokenizer: As `load_tokenizer` gives it.
        options: See there.
        on_progress: Called after every block.

    Raises:
        ValueError: The first fault of the input, unless they are skipped; nothing to learn is left;
            `target` is taken. Nothing is left behind then.
    """
    began = time.monotonic()
    template = choose_template(options.template, tokenizer)
    inputs = find_inputs(paths)
    account = Account(seq_length=options.samples.seq_length)
    reader = _Reader(inputs)
    pipeline = Pipeline(Vocabulary.of(tokenizer), template, options.samples)
    num_workers = options.num_workers or num_cpus()
    with StoreWriter(target, replace=options.replace) as writer:
        for block in run(pipeline, reader.items(), num_workers=num_workers):
            _check_faults(block, options)
            for sample in block.samples:
                writer.add(sample.id, sample.tokens, sample.spans)
            account.add(block)
            on_progress(Progress(account.num_rows, reader.num_read, reader.size))
        account.check()
        report = account.finish(
            files=reader.files(),
            ignored=[os.fsencode(p).decode(errors="backslashreplace") for p in inputs.ignored],
            seconds=time.monotonic() - began,
            seed=options.seed,
        )
        write_report(report, writer.report_directory)
        writer.finish(_recipe(tokenizer, template, options, reader.records()))
    return report


def _check_faults(block: Block, options: PrepareOptions) -> None:
    for fault in block.faults:
        if fault.reason == TOO_LONG or options.on_bad_row == "error":
            raise ValueError(fault.message)


def is_current(
    target: Path,
    paths: Sequence[Path | str],
    *,
    tokenizer: PreTrainedTokenizerFast,
    options: PrepareOptions,
) -> bool:
    """Whether `target` is just the store that `prepare` would write; reads the files whole."""
    try:
        manifest = read_manifest(target)
    except ValueError:  # not a whole store
        return False
    if manifest is None:
        return False
    files = find_inputs(paths).files
    if [(s.path, s.size) for s in manifest.recipe.sources] != [
        (str(file), file.stat().st_size) for file in files
    ]:
        return False
    template = choose_template(options.template, tokenizer)
    records = [_record(file) for file in files]
    return manifest.recipe == _recipe(tokenizer, template, options, records)


def _record(file: Path) -> SourceRecord:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return SourceRecord(path=str(file), size=file.stat().st_size, sha256=digest)


def _recipe(
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate | OwnTemplate,
    options: PrepareOptions,
    sources: Sequence[SourceRecord],
) -> Recipe:
    return Recipe(
        tokenizer=tokenizer_fingerprint(tokenizer),
        template=template.name,
        template_fingerprint=template_fingerprint(template),
        options={
            "seq_length": options.samples.seq_length,
            "too_long": options.samples.too_long,
            "history_reasoning": options.samples.history_reasoning,
            "on_bad_row": options.on_bad_row,
        },
        sources=tuple(sources),
    )


class _Reader:
    """All input files, one after the other."""

    def __init__(self, inputs: Inputs) -> None:
        self.sources = [Source(path) for path in inputs.files]
        self.size = sum(source.size for source in self.sources)

    @property
    def num_read(self) -> int:
        return sum(source.num_read for source in self.sources)

    def items(self) -> Iterator[Item]:
        for source in self.sources:
            yield from source.items()

    def files(self) -> list[FileAccount]:
        return [FileAccount(str(s.path), s.kind, s.size, s.sha256) for s in self.sources]

    def records(self) -> list[SourceRecord]:
        return [SourceRecord(path=str(s.path), size=s.size, sha256=s.sha256) for s in self.sources]
