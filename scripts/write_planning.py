"""Writes the table of recommended layouts in docs/planning.md, and in its Chinese page.

    python scripts/write_planning.py

Run it when the search changes. Takes some minutes: a search of the 671B for every row, with memory
in closed form.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

# Fused kernels are stood in for: there is nothing to compile.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

from megatron_dsv3.commands.plan_search import choices_text, layout_text
from megatron_dsv3.config.architecture import DEEPSEEK_V3
from megatron_dsv3.plan.cards import cluster_of
from megatron_dsv3.plan.kernels import load_kernels
from megatron_dsv3.plan.layouts import Precision, Request
from megatron_dsv3.plan.records import GIB
from megatron_dsv3.plan.search import Found, search

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN = "| `megatron-dsv3 plan search`"
NOTHING_FITS = "nothing fits: "
CHINESE = yaml.safe_load(Path(__file__).with_name("planning_zh.yaml").read_text("utf-8"))
"""Of words in the table."""
HOST_MEMORY_GIB = 2e12 / GIB
DOCUMENTS = {4096: None, 32768: 4096, 131072: 32768}
"""Tokens of a row: of a typical sample, where rows are longer."""
BOTH: tuple[Precision, ...] = ("bf16", "fp8")


@dataclass(frozen=True, slots=True)
class Question:
    """A row of the table."""

    nodes: int
    seq_length: int
    card: str = "h100-80gb"
    precisions: tuple[Precision, ...] = ("bf16",)

    @property
    def command(self) -> str:
        """What a user adds to `megatron-dsv3 plan search`."""
        document = DOCUMENTS[self.seq_length]
        words = [
            f"--gpu {self.card}" * (self.card != "h100-80gb"),
            f"--nodes {self.nodes} --seq-length {self.seq_length}",
            f"--document-length {document}" if document else "",
            "--precision bf16" * (self.precisions == ("bf16",)),
        ]
        return " ".join(filter(None, words))

    @property
    def request(self) -> Request:
        """The same for the search."""
        return Request(
            arch=DEEPSEEK_V3,
            cluster=cluster_of(self.card, host_memory_gib=HOST_MEMORY_GIB),
            nodes=self.nodes,
            seq_length=self.seq_length,
            document_length=DOCUMENTS[self.seq_length],
            precisions=self.precisions,
        )


QUESTIONS = [
    *(Question(nodes, length) for length in DOCUMENTS for nodes in (8, 16, 32, 64, 128)),
    *(Question(*sizes, precisions=BOTH) for sizes in ((16, 4096), (32, 4096), (32, 32768))),
    *(Question(n, 32768, card) for card in ("h200-141gb", "h20-96gb") for n in (8, 16, 32)),
]


def row(question: Question) -> str:
    """A line of the table."""
    request = question.request
    try:
        result = search(request, load_kernels(request.cluster.card), top=1)
    except ValueError as error:
        return f'| `{question.command}` | {NOTHING_FITS}"{error}"' + " |" * 7
    cells = _cells(result.found[0])
    return f"| `{question.command}` | " + " | ".join(cells) + " |"


def _cells(best: Found) -> list[str]:
    plan, work, step = best.plan, best.plan.workload, best.plan.step
    dp_size = work.parallel.dp_size(work.world_size)
    rows = work.micro_batch_size * work.num_micro_batches * dp_size
    return [
        layout_text(work),
        choices_text(best),
        f"{rows} by {work.micro_batch_size}",
        f"{plan.fullest.total / GIB:.0f}",
        f"{step.total:.1f}",
        f"{step.tokens_per_second_per_gpu:.0f}",
        f"{step.mfu:.1%}",
    ]


def in_chinese(line: str) -> str:
    """The same line for the Chinese page: commands, layouts and messages stay as they are."""
    cells = line.split(" | ")
    if cells[1].startswith(NOTHING_FITS):
        cells[1] = cells[1].replace(NOTHING_FITS, CHINESE[NOTHING_FITS])
    else:
        words = cells[2].split(", ")
        cells[2] = CHINESE[", "].join(CHINESE.get(word, word) for word in words)
    return " | ".join(cells)


def put(page: Path, rows: list[str]) -> None:
    """In place of those that are there."""
    lines = page.read_text(encoding="utf-8").split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith(BEGIN)) + 2
    last = next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
    page.write_text("\n".join([*lines[:first], *rows, *lines[last:]]), encoding="utf-8")


def main() -> None:
    """Both pages at the end, a row at a time on the screen."""
    rows = []
    for question in QUESTIONS:
        rows.append(row(question))
        print(rows[-1], file=sys.stderr, flush=True)
    put(DOCS / "planning.md", rows)
    put(DOCS / "zh" / "planning.md", [in_chinese(line) for line in rows])


if __name__ == "__main__":
    main()
