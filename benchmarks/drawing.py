"""The look that pictures of benchmarks share."""

from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def finish(figure: Figure, panels: Iterable[Axes], path: Path) -> None:
    """Grids, no frames, and the file."""
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
