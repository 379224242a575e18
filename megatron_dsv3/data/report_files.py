"""A report as `report.json`, and as pictures beside it.

Pictures are drawn on canvases of their own: matplotlib's global state is left alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from megatron_dsv3.data.report import Histogram, Report

_BLUE, _ORANGE, _GRAY = "#0067a8", "#d55e00", "#5b6675"


def write_report(report: Report, directory: Path) -> None:
    """Writes all files into the directory, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(report), indent=1, ensure_ascii=False)
    (directory / "report.json").write_text(text + "\n", encoding="utf-8")
    for name, draw in PICTURES.items():
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, report)
        FigureCanvasAgg(figure)
        figure.savefig(directory / f"{name}.png")


def _draw_lengths(axes: Axes, report: Report) -> None:
    _bars(axes, report.lengths, _BLUE, "kept")
    if any(report.lengths_too_long.counts):
        _bars(axes, report.lengths_too_long, _ORANGE, "did not fit")
    limit = report.packing.row_length
    axes.axvline(limit, color=_GRAY, linestyle="dashed", label=f"sequence length {limit:,}")
    _token_axis(axes.set_xscale, axes)
    axes.set(title="Length of samples", xlabel="tokens", ylabel="samples")
    axes.legend(frameon=False)


def _draw_counted(axes: Axes, report: Report) -> None:
    _bars(axes, report.counted_share, _BLUE, "")
    share = report.tokens.counted / report.tokens.kept
    axes.axvline(share, color=_GRAY, linestyle="dashed", label=f"all tokens: {share:.1%}")
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set(title="Counted tokens", xlabel="share of a sample's tokens", ylabel="samples")
    axes.legend(frameon=False)


def _draw_packing(axes: Axes, report: Report) -> None:
    packing = report.packing
    _bars(axes, packing.fill_of_rows, _BLUE, "")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    title = f"Packing: {packing.rows:,} rows of {packing.row_length:,}, {packing.fill:.2%} full"
    axes.set(title=title, xlabel="share of a row that holds tokens", ylabel="rows")


def _draw_reasoning(axes: Axes, report: Report) -> None:
    edges = np.array(report.reasoning_answer.edges)
    counts = np.array(report.reasoning_answer.counts)
    axes.set(title="Reasoning and answer", xlabel="tokens of reasoning", ylabel="tokens of answer")
    if not counts.any():
        axes.text(0.5, 0.5, "no sample with reasoning", ha="center", transform=axes.transAxes)
        return
    ends = np.append(edges, edges[-1] * 2**0.5)
    mesh = axes.pcolormesh(ends, ends, np.ma.masked_equal(counts.T, 0), norm=LogNorm(vmin=1))
    _token_axis(axes.set_xscale, axes)
    _token_axis(axes.set_yscale, axes)
    rows, columns = np.nonzero(counts)
    axes.set_xlim(ends[rows.min()], ends[rows.max() + 1])
    axes.set_ylim(ends[columns.min()], ends[columns.max() + 1])
    assert axes.figure is not None
    axes.figure.colorbar(mesh, ax=axes, label="samples")


PICTURES: Mapping[str, Callable[[Axes, Report], None]] = {
    "lengths": _draw_lengths,
    "counted": _draw_counted,
    "packing": _draw_packing,
    "reasoning": _draw_reasoning,
}
"""Name of the file to what it shows."""


def _bars(axes: Axes, histogram: Histogram, color: str, label: str) -> None:
    """Bars without the empty ones at both ends."""
    counts = np.array(histogram.counts)
    filled = np.flatnonzero(counts)
    shown = slice(filled[0], filled[-1] + 1)
    edges = np.array(histogram.edges)
    # The last bin has no end: it is drawn as wide as the one before.
    ends = np.append(edges, 2 * edges[-1] - edges[-2])
    axes.bar(
        edges[shown],
        counts[shown],
        width=np.diff(ends)[shown],
        align="edge",
        color=color,
        alpha=0.8,
        label=label,
    )


def _token_axis(set_scale: Callable[..., None], axes: Axes) -> None:
    set_scale("log", base=2)
    axis = axes.xaxis if set_scale == axes.set_xscale else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
