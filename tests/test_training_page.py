"""Rows of docs/training.md that the planner and the H100 gave are as in the pages they are from."""

import re

from documents import ROOT

DOCS = ROOT / "docs"
LAYOUT = re.compile(r"(?:[A-Z]+\d+ ?)+")


def rows(name: str) -> list[list[str]]:
    """Cells of every row of a page's tables."""
    lines = (DOCS / name).read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]


def of_planner(cells: list[str]) -> tuple:
    """A row of planning.md: nodes, tokens of a row, layout, batch, GiB, tokens/s."""
    options = dict(re.findall(r"--(\S+) (\S+?)`? ", f"{cells[0]} "))
    length = int(options["seq-length"]) // 1024
    return options["nodes"], f"{length}k", cells[1], cells[3], cells[4], cells[6]


def repeated(cells: list[str]) -> tuple:
    """The same of a row of training.md."""
    layout = LAYOUT.match(cells[2])
    assert layout, cells
    gib, speed = cells[6].split()[0], re.findall(r"[\d,]+(?= tokens/s)", cells[7])[0]
    return cells[1], cells[4], layout[0].strip(), cells[3], gib, speed


def test_projected_rows_are_those_of_the_planner():
    ours = [cells for cells in rows("training.md") if cells[-1].startswith("projected to train")]
    known = {
        of_planner(cells)
        for cells in rows("planning.md")
        if cells[0].startswith("`--nodes") and len(cells) == 8 and cells[6]
    }
    assert len(ours) == 6
    for cells in ours:
        assert repeated(cells) in known, cells


def test_measured_rows_are_those_of_the_benchmarks():
    ours = [cells for cells in rows("training.md") if "**measured**" in cells[0]]
    known = {(cells[5], cells[3]) for cells in rows("benchmarks.md") if len(cells) == 6}
    assert len(ours) == 3
    for cells in ours:
        pair = (cells[6].removesuffix(" GiB"), cells[7].removesuffix(" tokens/s"))
        assert pair in known, cells


def test_what_does_not_fit_is_what_the_planner_refuses():
    [row] = [cells for cells in rows("training.md") if cells[-1] == "does not fit"]
    refused = [cells[0] for cells in rows("planning.md") if "nothing fits" in cells[1]]
    length = int(row[4].removesuffix("k")) * 1024
    assert any(f"--nodes {row[1]} --seq-length {length} " in options for options in refused)
