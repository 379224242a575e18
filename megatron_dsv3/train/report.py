"""Figures of one run, or of several laid over one another.

They are drawn on canvases of their own: matplotlib's global state (pyplot, the backend, rcParams)
is left alone. Curves show the steps whose update was applied; skipped ones get a mark.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from megatron_dsv3.train.run_log import Array, RunLog


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """Colours of a page and its figures."""

    background: str
    text: str
    muted: str
    """For what stands back: axes, marks."""
    grid: str
    colors: tuple[str, ...]
    """Of curves. Colour-blind eyes tell them apart too, the first three best."""


LIGHT = Theme(
    background="#ffffff",
    text="#1b2430",
    muted="#5b6675",
    grid="#e4e8ee",
    colors=("#0067a8", "#d55e00", "#009e73", "#c05a96", "#e3a000", "#2b3440"),
)
DARK = Theme(
    background="#14181f",
    text="#e6eaf0",
    muted="#9aa5b4",
    grid="#2a313c",
    colors=("#4fa8e8", "#ee7733", "#10b98a", "#d884bc", "#f7d95c", "#dde2ea"),
)

# What is drawn

type Dash = Literal["solid", "dashed", "dotted", "none"]


@dataclass(frozen=True, slots=True)
class Series:
    """One column of a run as a curve."""

    key: str
    label: str = ""
    kind: Literal["noisy", "exact", "sparse"] = "noisy"
    """noisy: thin, with its running mean; exact: one line; sparse: a dot for every value."""
    dash: Dash = "solid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One pair of axes; left out where no run has anything for it."""

    label: str
    """Of the vertical axis, with its unit."""
    series: tuple[Series, ...]
    scale: Literal["linear", "log"] = "linear"
    bottom: float | None = None
    """Where the vertical axis begins; None: just below the curves."""
    format: Callable[[float, float], str] | None = None
    """Of the numbers at the vertical axis; None: matplotlib's choice."""
    marks_skipped: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure: panels below one another, over the same steps."""

    title: str
    panels: tuple[Panel, ...]


def _plain(value: float, _: float) -> str:
    return f"{value:g}"


def _scientific(value: float, _: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-") if value else "0"


def _with_prefix(value: float, _: float) -> str:
    return EngFormatter(sep="").format_eng(value)


CHARTS: Mapping[str, Chart] = {
    "loss": Chart(
        "Loss",
        (
            Panel(
                label="nats per token",
                series=(
                    Series("loss", "training"),
                    Series("mtp_loss", "MTP", dash="dashed"),
                    Series("validation_loss", "validation", kind="sparse", dash="dotted"),
                ),
                marks_skipped=True,
            ),
        ),
    ),
    "learning_rate": Chart(
        "Learning rate",
        (
            Panel(
                label="learning rate",
                series=(Series("lr", kind="exact"),),
                bottom=0,
                format=_scientific,
            ),
        ),
    ),
    "grad_norm": Chart(
        "Gradient norm",
        (
            Panel(
                label="L2 norm before clipping",
                series=(Series("grad_norm"),),
                scale="log",
                format=_plain,
            ),
        ),
    ),
    "throughput": Chart(
        "Throughput",
        (
            Panel(
                label="tokens/s",
                series=(Series("tokens_per_second"),),
                bottom=0,
                format=_with_prefix,
            ),
            Panel(label="TFLOP/s/device", series=(Series("tflops_per_device"),), bottom=0),
        ),
    ),
    "expert_balance": Chart(
        "Expert balance",
        (Panel(label="largest / mean expert load", series=(Series("expert_balance"),), bottom=1),),
    ),
}
EXPERT_LOAD = "expert_load"
TITLES = {name: chart.title for name, chart in CHARTS.items()} | {EXPERT_LOAD: "Expert load"}
WIDTH, HEIGHT, DPI = 5.4, 3.3, 200
"""Inches, and dots per inch; of few inches, so that text is legible where a phone shrinks them."""
SMALL, LARGE = 9, 13
"""Sizes of type, in points."""


def draw(runs: Sequence[RunLog], theme: Theme = LIGHT) -> dict[str, Figure]:
    """Figures by name: those of `TITLES` for which a run has logged anything.

    Raises:
        ValueError: There are more runs than colours.
    """
    if len(runs) > len(theme.colors):
        raise ValueError(f"{len(runs)} runs: colours tell {len(theme.colors)} apart; give fewer")
    figures = {name: _draw_chart(chart, runs, theme) for name, chart in CHARTS.items()}
    figures[EXPERT_LOAD] = _draw_expert_load(runs, theme)
    return {name: figure for name, figure in figures.items() if figure}


def to_png(figure: Figure) -> bytes:
    """The same figure gives the same bytes, whatever a matplotlibrc says of saving."""
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


# Charts


@dataclass(frozen=True, slots=True)
class Curve:
    """A series of a run in its colour."""

    series: Series
    steps: Array
    values: Array
    color: str


def _curves(panel: Panel, runs: Sequence[RunLog], theme: Theme) -> Iterator[Curve]:
    """Those with anything to show; one run's differ in colour, several runs' share the run's."""
    for i, run in enumerate(runs):
        for j, series in enumerate(panel.series):
            steps, values = run.curve(series.key)
            if panel.scale == "log":
                steps, values = steps[values > 0], values[values > 0]
            if values.size:
                yield Curve(series, steps, values, theme.colors[j if len(runs) == 1 else i])


def _draw_chart(chart: Chart, runs: Sequence[RunLog], theme: Theme) -> Figure | None:
    panels = [panel for panel in chart.panels if any(_curves(panel, runs, theme))]
    if not panels:
        return None
    figure = _figure(chart.title, theme)
    all_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        _style(axes, theme)
        axes.set(ylabel=panel.label, yscale=panel.scale)
        for curve in _curves(panel, runs, theme):
            _plot(axes, curve, log=panel.scale == "log")
        _scale(axes, panel)
        if panel.marks_skipped:
            _mark_skipped(axes, runs, theme)
    _add_legend(all_axes[0], _keys(panels[0], runs, theme), theme)
    all_axes[-1].set_xlabel("optimizer step")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    all_axes[-1].xaxis.set_major_formatter("{x:,.0f}")
    figure.align_ylabels()
    return figure


def _figure(title: str, theme: Theme) -> Figure:
    figure = Figure((WIDTH, HEIGHT), dpi=DPI, facecolor=theme.background, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=LARGE, weight="bold", color=theme.text)
    return figure


def _style(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.background)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.tick_params(which="both", colors=theme.muted, labelsize=SMALL, length=0, pad=4)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.muted)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=theme.text, fontsize=SMALL)


def _scale(axes: Axes, panel: Panel) -> None:
    """Ticks that suit the curves already drawn."""
    if panel.scale == "log":
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    if panel.format:
        axes.yaxis.set_major_formatter(panel.format)
    if panel.bottom is not None:
        axes.set_ylim(bottom=panel.bottom)


def _plot(axes: Axes, curve: Curve, *, log: bool) -> None:
    steps, values, series = curve.steps, curve.values, curve.series
    if series.kind == "sparse":
        dot = "o" if len(steps) < 50 else "none"  # more of them run into one another
        axes.plot(steps, values, color=curve.color, lw=1.2, ls=series.dash, marker=dot, ms=3.5)
        return
    if series.kind == "noisy" and len(steps) > 20:
        axes.plot(steps, values, color=curve.color, lw=0.7, alpha=0.35)
        values = np.exp(running_mean(np.log(values))) if log else running_mean(values)
    dot = "o" if len(steps) == 1 else "none"  # one point makes no line
    axes.plot(steps, values, color=curve.color, lw=1.8, ls=series.dash, marker=dot)


def running_mean(values: Array) -> Array:
    """Over a 20th of the points around each, the near ones weighing most; over less at both ends.

    Around each point, so that it does not lag behind the curve as an exponential mean would.
    """
    half = max(1, len(values) // 80)
    for _ in range(2):  # the mean of a mean: its weights fall off to both sides, and no step shows
        index = np.arange(len(values))
        first, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
        sums = np.concatenate([[0.0], np.cumsum(values)])
        values = (sums[end] - sums[first]) / (end - first)
    return values


def _mark_skipped(axes: Axes, runs: Sequence[RunLog], theme: Theme) -> None:
    """Crosses at the foot, as the loss of such a step is far beyond the others, or not finite."""
    foot = axes.get_xaxis_transform()
    for run, of_run in zip(runs, theme.colors, strict=False):
        steps = run.columns["step"][run.skipped]
        color = theme.muted if len(runs) == 1 else of_run
        if steps.size:
            axes.plot(steps, np.full(len(steps), 0.03), "x", color=color, ms=5, transform=foot)


# Legend


@dataclass(frozen=True, slots=True)
class Key:
    """An entry of a legend."""

    label: str
    color: str
    dash: Dash = "solid"
    marker: str = "none"


def _keys(panel: Panel, runs: Sequence[RunLog], theme: Theme) -> tuple[list[Key], list[Key]]:
    """(runs, series): several runs have their colours, and series their dashes; else the series
    have the colours."""
    one = len(runs) == 1
    shown = {curve.series for curve in _curves(panel, runs, theme)}
    series = [
        Key(s.label, color if one else theme.muted, s.dash, "o" if s.kind == "sparse" else "none")
        for s, color in zip(panel.series, theme.colors, strict=False)
        if s in shown and len(shown) > 1
    ]
    if panel.marks_skipped and any(run.skipped.any() for run in runs):
        series.append(Key("skipped step", theme.muted, "none", "x"))
    pairs = zip(runs, theme.colors, strict=False)
    return [] if one else [Key(run.name, color) for run, color in pairs], series


def _add_legend(axes: Axes, keys: tuple[list[Key], list[Key]], theme: Theme) -> None:
    """Above the axes: in a row where there is room, else runs and series in a column each."""
    entries, columns = [*keys[0], *keys[1]], len(keys[0]) + len(keys[1])
    if not entries:
        return
    if sum(7 + len(key.label) for key in entries) > 63:
        rows = max(map(len, keys))
        blank = Key("", theme.background, "none")
        entries = [key for part in keys if part for key in part + [blank] * (rows - len(part))]
        columns = len(entries) // rows
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.set_figheight(figure.get_figheight() + 0.18 * (rows - 1))
    legend = axes.legend(
        [Line2D([], [], color=k.color, ls=k.dash, marker=k.marker, ms=4) for k in entries],
        [""] * len(entries),
        ncols=columns,
        loc="lower left",
        bbox_to_anchor=(-0.015, 1.0),
        frameon=False,
        fontsize=SMALL,
        labelcolor=theme.text,
        columnspacing=1.5,
        borderpad=0.3,
    )
    for text, key in zip(legend.get_texts(), entries, strict=True):
        text.set_parse_math(False)  # the name of a directory may hold a $
        text.set_text(key.label)


# Heat map

LOAD_TICKS = {1 / 8: "1/8", 1 / 4: "1/4", 1 / 2: "1/2", 1: "1", 2: "2", 4: "4", 8: "8"}
"""One scale for all, so that a colour means the same in every report."""


def _draw_expert_load(runs: Sequence[RunLog], theme: Theme) -> Figure | None:
    loads = [(run.name, run.expert_load) for run in runs if run.expert_load]
    if not loads:
        return None
    figure = _figure(TITLES[EXPERT_LOAD], theme)
    figure.set_figheight(max(HEIGHT, 2.2 * len(loads)))
    all_axes = figure.subplots(len(loads), squeeze=False)[:, 0]
    lowest, highest = min(LOAD_TICKS), max(LOAD_TICKS)
    for axes, (name, load) in zip(all_axes, loads, strict=True):
        _style(axes, theme)
        axes.grid(visible=False)
        # An expert without a token has no logarithm: it is shown at the end of the scale.
        image = axes.imshow(
            load.relative.clip(lowest, highest),
            norm=LogNorm(lowest, highest),
            cmap="RdBu_r",
            aspect="auto",
            interpolation="nearest",
        )
        title = f"step {load.step:,}" if len(runs) == 1 else f"{name}, step {load.step:,}"
        axes.set_title(title, loc="left", fontsize=SMALL, color=theme.text, parse_math=False)
        axes.set_ylabel("layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        names = dict(enumerate(load.layers))
        axes.yaxis.set_major_formatter(lambda row, _, names=names: str(names.get(row, "")))
    all_axes[-1].set_xlabel("expert")
    bar = figure.colorbar(image, ax=list(all_axes), extend="both", aspect=30, pad=0.02)
    bar.set_label("load / mean of its layer", color=theme.text, fontsize=SMALL)
    bar.set_ticks(list(LOAD_TICKS), labels=list(LOAD_TICKS.values()))
    bar.minorticks_off()
    bar.ax.tick_params(colors=theme.muted, labelsize=SMALL, length=0)
    bar.outline.set_visible(False)
    return figure
