"""Pictures of a plan: memory of every stage, and the pipeline's clock."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_dsv3.plan.records import GIB, Plan, StageMemory
from megatron_dsv3.plan.schedule import Timeline

COLOURS: Mapping[str, str] = {
    "weights": "#4e79a7", "gradients": "#76b7b2", "optimizer": "#59a14f", "caches": "#8cd17d",
    "activations": "#f28e2b", "experts": "#ffbe7d", "recomputed": "#edc948", "logits": "#e15759",
    "MTP": "#b07aa1", "working": "#ff9da7", "buffers": "#9c755f", "update": "#d37295",
    "fragmentation": "#bab0ac",
}  # fmt: skip
DPI = 120


def parts(stage: StageMemory) -> dict[str, float]:
    """GiB of one stage's fullest rank by kind; they sum to its total."""
    states, activations = stage.states, stage.activations
    sizes = {
        "weights": states.weights, "gradients": states.gradients, "optimizer": states.optimizer,
        "caches": states.caches,
        "activations": activations.saved, "experts": activations.experts,
        "recomputed": activations.recomputed, "logits": activations.logits,
        "MTP": activations.mtp, "working": activations.working, "buffers": stage.buffers,
        "update": max(0, states.update - activations.total), "fragmentation": stage.fragmentation,
    }  # fmt: skip
    return {name: size / GIB for name, size in sizes.items()}


def draw_memory(plan: Plan, path: Path) -> None:
    """Stacked bars, a stage each, under the line of the card's memory."""
    figure, axes = _figure(max(6.0, 0.55 * len(plan.stages) + 3), 4.5)
    bottoms = [0.0] * len(plan.stages)
    ranks = [stage.pp_rank for stage in plan.stages]
    sizes = [parts(stage) for stage in plan.stages]
    for name, colour in COLOURS.items():
        heights = [size[name] for size in sizes]
        if max(heights) > 0:
            axes.bar(ranks, heights, bottom=bottoms, color=colour, label=name, width=0.8)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    card = plan.cluster.card
    axes.axhline(card.memory_gib, color="black", linestyle="--", label=card.name)
    axes.set_xlabel("pipeline stage")
    axes.set_ylabel("GiB")
    axes.set_xticks(ranks)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    _save(figure, path)


def draw_timeline(timeline: Timeline, path: Path) -> None:
    """Forward and backward passes of every stage over time; darker chunks come later."""
    num_stages = len(timeline.busy)
    figure, axes = _figure(11.0, max(2.5, 0.32 * num_stages + 1.2))
    num_chunks = 1 + max(event.task.chunk for event in timeline.events)
    for is_forward, colour in ((True, "#4e79a7"), (False, "#59a14f")):
        for chunk in range(num_chunks):
            chosen = [
                event
                for event in timeline.events
                if event.task.is_forward == is_forward and event.task.chunk == chunk
            ]
            axes.barh(
                [event.pp_rank for event in chosen],
                [event.end - event.start for event in chosen],
                left=[event.start for event in chosen],
                color=colour,
                alpha=_shade(chunk, num_chunks),
                edgecolor="white",
                linewidth=0.3,
                height=0.9,
                label=("forward" if is_forward else "backward") if chunk == num_chunks - 1 else "",
            )
    axes.invert_yaxis()
    axes.set_yticks(range(num_stages))
    axes.set_xlabel("seconds (the first micro-batches of a step)")
    axes.set_ylabel("pipeline stage")
    axes.legend(loc="upper right", ncols=2, frameon=False, bbox_to_anchor=(1.0, 1.15))
    _save(figure, path)


def _shade(chunk: int, num_chunks: int) -> float:
    return 0.45 + 0.55 * (chunk + 1) / num_chunks


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # Not pyplot, which holds figures and asks for a display.
    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    return figure, figure.add_subplot()


def _save(figure: Figure, path: Path) -> None:
    with path.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})  # type: ignore[no-untyped-call]
