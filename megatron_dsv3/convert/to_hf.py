"""Any checkpoint -> a Hugging Face directory in BF16 or in DeepSeek's FP8.

One unit of work is one shard. Which tensor is in which follows from the architecture, so a node
needs nothing from the others; index, config.json and all that is small come after the shards.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.convert.error_report import REPORT, ErrorReport, to_rows
from megatron_dsv3.convert.hf_io import (
    HFReader,
    check_tensors,
    copy_tokenizer_files,
    tokenizer_files,
    write_index,
    write_json,
)
from megatron_dsv3.convert.hf_plan import Precision, ShardPlan, plan_shards
from megatron_dsv3.convert.journal import Report, Written
from megatron_dsv3.convert.megatron_io import AHEAD_BYTES
from megatron_dsv3.convert.offline import Unit
from megatron_dsv3.convert.safetensors_file import explained
from megatron_dsv3.convert.sources import Source, fingerprint
from megatron_dsv3.convert.write_shard import check_original, write_shard

SHARD_BYTES = 5_000_000_000
_HEADER_BYTES_A_TENSOR = 200
"""In the file's header, at most: a name, a type, a shape and two offsets."""
_HF_DTYPES: Mapping[Precision, str] = {"bf16": "bfloat16", "fp8": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class ToHF:
    """The direction anything -> HF, for the engine."""

    source: Source
    source_mark: str
    """Tells the source from any other."""
    arch: Architecture
    shards: tuple[ShardPlan, ...]
    precision: Precision
    template: Path | None = None
    """Whose tokenizer, generation config and remote code are taken over."""
    scales_from: Path | None = None
    """FP8 checkpoint whose blocks stay where they stand for the same numbers."""

    @classmethod
    def open(
        cls,
        source: Source,
        arch: Architecture,
        *,
        place: Path,
        precision: Precision,
        shard_bytes: int = SHARD_BYTES,
        template: Path | None = None,
        scales_from: Path | None = None,
    ) -> "ToHF":
        """Plans the shards and checks everything that they will be made of.

        Args:
            source: Where the numbers come from.
            arch: Of the model in it.
            place: File or directory of the source.
            precision: Of the weights that are written.
            shard_bytes: Largest shard; a larger tensor gets one of its own.
            template: A checkpoint with a tokenizer.
            scales_from: The FP8 checkpoint that training started from.

        Raises:
            ValueError: The source, the template or the FP8 checkpoint do not fit the architecture.
        """
        shapes = {name: info.shape for name, info in source.infos().items()}
        check_tensors(shapes, arch, where=str(place))
        shards = plan_shards(arch, precision=precision, shard_bytes=shard_bytes)
        if template is not None:
            tokenizer_files(template)
        if scales_from is not None:
            if precision != "fp8":
                raise ValueError(f"scales are kept in fp8 alone, not in {precision}")
            check_original(HFReader(scales_from), shards)
        mark = fingerprint(place)
        return cls(source, mark, arch, shards, precision, template, scales_from)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_original"}

    @cached_property
    def _original(self) -> HFReader | None:
        if self.scales_from is None:
            return None
        return HFReader(self.scales_from, ahead_bytes=AHEAD_BYTES)

    def options(self) -> Mapping[str, Any]:
        """What the result depends on."""
        return {
            "to": "hf",
            "source": self.source_mark,
            "dtype": self.precision,
            "config": self._config(),
            "shards": {shard.file: shard.nbytes for shard in self.shards},
            "template": None if self.template is None else str(self.template.resolve()),
            "scales from": None if self.scales_from is None else fingerprint(self.scales_from),
        }

    def units(self) -> list[Unit]:
        """One for each shard."""
        return [
            Unit(shard.file, shard.nbytes + _HEADER_BYTES_A_TENSOR * len(shard.layout))
            for shard in self.shards
        ]

    def write(
        self, unit: str, path: Path, *, piece_bytes: int, on_bytes: Callable[[int], None]
    ) -> Written:
        """Writes one shard and reports its errors."""
        (shard,) = [shard for shard in self.shards if shard.file == unit]
        written = write_shard(
            shard,
            self.source,
            path,
            original=self._original,
            piece_bytes=piece_bytes,
            on_bytes=on_bytes,
        )
        return Written(written.parts, {"errors": to_rows(written.errors)})

    def finish(self, folder: Path, reports: Mapping[str, Report]) -> None:
        """Writes index, config.json, the report of errors, and what comes from the template."""
        with explained(folder):
            write_index(folder, {shard.file: shard.layout for shard in self.shards})
            write_json(folder / "config.json", self._config())
            write_json(folder / REPORT, errors_of(reports).to_json())
            if self.template is not None:
                copy_tokenizer_files(self.template, folder)

    def _config(self) -> dict[str, Any]:
        return self.arch.to_hf(dtype=_HF_DTYPES[self.precision], fp8=self.precision == "fp8")


def errors_of(reports: Mapping[str, Report]) -> ErrorReport:
    """The errors of all shards."""
    return ErrorReport.merged(report["errors"] for report in reports.values())
