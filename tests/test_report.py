"""Figures hold the data, the page needs nothing else, and a report replaces the one before."""

import base64
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from rich.console import Console
from test_run_log import record, write_load, write_run

from megatron_dsv3.commands import report as command
from megatron_dsv3.train import report
from megatron_dsv3.train.report import CHARTS, DARK, LIGHT, TITLES, draw, running_mean, to_png
from megatron_dsv3.train.report_page import to_html, write_report
from megatron_dsv3.train.run_log import read_runs

ROOT = Path(__file__).resolve().parents[1]
STEPS = 60
BEFORE = dict(mpl.rcParams)


@pytest.fixture(scope="module", autouse=True)
def _coarse():
    """Few pixels are drawn and compressed sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "DPI", 30)
        yield


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    run = write_full_run(tmp_path_factory.mktemp("run"))
    return write_report(read_runs([run]), run / "report")


@pytest.fixture
def run(tmp_path) -> Path:
    """One that used everything: validation on some steps, a skipped update, expert loads."""
    return write_full_run(tmp_path / "run")


def write_full_run(directory: Path, *, shift: float = 0.0) -> Path:
    noise = np.random.default_rng(0)
    lines = [
        record(
            step,
            num_steps=100,
            loss=shift + 3 - step / 50 + noise.normal() / 20,
            mtp_loss=shift + 4 - step / 50,
            validation_loss=shift + 3.1 - step / 50 if step % 20 == 0 else None,
            grad_norm=float(np.exp(noise.normal())),
            lr=1e-6 * step / STEPS,
            seconds=2 + noise.random(),
            expert_balance=2 - step / 100,
        )
        for step in range(1, STEPS + 1)
    ]
    lines[29] |= {"skipped": "loss is not finite", "loss": float("nan")}
    write_run(directory, *lines)
    write_load(directory, '{"step": 50, "layers": [3, 4], "load": [[0, 4, 8], [60, 1, 2]]}\n')
    return directory


def has_line(axes: Axes, steps: np.ndarray, values: np.ndarray) -> bool:
    return any(
        np.array_equal(line.get_xdata(), steps) and np.array_equal(line.get_ydata(), values)
        for line in axes.lines
    )


# Figures


def test_every_series_is_drawn_as_it_was_logged(run):
    runs = read_runs([run])
    figures = draw(runs)
    assert set(figures) == set(TITLES)
    for name, chart in CHARTS.items():
        for axes, panel in zip(figures[name].axes, chart.panels, strict=True):
            for series in panel.series:
                assert has_line(axes, *runs[0].curve(series.key)), series.key


def test_a_noisy_curve_has_its_running_mean(run):
    [log] = read_runs([run])
    figures = draw([log])
    steps, loss = log.curve("loss")
    assert has_line(figures["loss"].axes[0], steps, running_mean(loss))
    steps, norm = log.curve("grad_norm")
    on_log_axis = np.exp(running_mean(np.log(norm)))
    assert has_line(figures["grad_norm"].axes[0], steps, on_log_axis)
    assert figures["grad_norm"].axes[0].get_yscale() == "log"
    assert len(figures["learning_rate"].axes[0].lines) == 1, "a schedule is not noise"


def test_the_running_mean_is_smooth_and_does_not_lag():
    line = np.linspace(5.0, 1.0, 400)
    noise = np.random.default_rng(0).normal(size=400)
    assert np.allclose(running_mean(line)[20:-20], line[20:-20])
    assert np.allclose(running_mean(np.full(7, 2.5)), 2.5)
    assert running_mean(noise).std() < 0.4 * noise.std()
    assert running_mean(line + noise).shape == line.shape


def test_every_axis_says_what_it_shows_and_in_what_unit(run):
    for name, figure in draw(read_runs([run])).items():
        assert figure.get_suptitle() == TITLES[name]
        assert all(axes.get_ylabel() for axes in figure.axes), name
        assert any(axes.get_xlabel() in ("optimizer step", "expert") for axes in figure.axes), name
    labels = [axes.get_ylabel() for axes in draw(read_runs([run]))["throughput"].axes]
    assert labels == ["tokens/s", "TFLOP/s/device"]


def test_a_skipped_update_is_marked_at_the_foot(run):
    axes = draw(read_runs([run]))["loss"].axes[0]
    [marks] = [line for line in axes.lines if line.get_marker() == "x"]
    assert list(marks.get_xdata()) == [30]
    assert "skipped step" in legend(axes)


def legend(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_one_run_has_its_series_in_colours(run):
    axes = draw(read_runs([run]))["loss"].axes[0]
    assert legend(axes) == ["training", "MTP", "validation", "skipped step"]
    keys = [line.get_color() for line in axes.get_legend().legend_handles[:3]]
    assert keys == list(LIGHT.colors[:3])


def test_several_runs_lie_over_one_another_each_in_its_colour(run, tmp_path):
    runs = read_runs([run, write_full_run(tmp_path / "other", shift=1.0)])
    figures = draw(runs, DARK)
    for key, name in (("loss", "loss"), ("lr", "learning_rate"), ("grad_norm", "grad_norm")):
        axes = figures[name].axes[0]
        for log, color in zip(runs, DARK.colors, strict=False):
            drawn = [line for line in axes.lines if line.get_color() == color]
            assert any(np.array_equal(line.get_ydata(), log.curve(key)[1]) for line in drawn), key
        assert legend(axes)[:2] == ["run", "other"]


def test_no_more_runs_than_colours(run):
    with pytest.raises(ValueError, match="7 runs: colours tell 6 apart; give fewer"):
        draw(read_runs([run]) * 7)


def test_a_name_is_no_formula(tmp_path):
    runs = read_runs([write_full_run(tmp_path / name) for name in ("_a$^$", "b$^$")])
    figures = draw(runs)
    assert legend(figures["learning_rate"].axes[0]) == ["_a$^$", "b$^$"]
    assert figures["expert_load"].axes[0].get_title(loc="left") == "_a$^$, step 50"
    for figure in figures.values():
        to_png(figure)  # a formula would be parsed here, and refused


def test_the_expert_load_is_a_heat_map_on_a_fixed_scale(run):
    axes, bar = draw(read_runs([run]))["expert_load"].axes
    [image] = axes.images
    expected = np.array([[1 / 8, 1, 2], [20 / 7, 1 / 8, 1 / 8]])  # none, and 1/21, are at its end
    assert np.allclose(image.get_array(), expected)
    assert image.get_clim() == (1 / 8, 8)
    assert axes.get_title(loc="left") == "step 50"
    assert [axes.yaxis.get_major_formatter()(row, None) for row in (0, 1, 2)] == ["3", "4", ""]
    assert bar.get_yticklabels()[0].get_text() == "1/8"


def test_what_no_run_has_is_not_drawn(tmp_path):
    lines = [record(step, grad_norm=0.0, mtp_loss=None) for step in (1, 2)]
    figures = draw(read_runs([write_run(tmp_path, *lines)]))
    assert set(figures) == set(TITLES) - {"grad_norm", "expert_load"}, "0 is on no log axis"
    axes = figures["loss"].axes[0]
    assert len(axes.lines) == 1
    assert axes.get_legend() is None


def test_a_single_step_can_be_seen(tmp_path):
    [line] = draw(read_runs([write_run(tmp_path, record(1, mtp_loss=None))]))["loss"].axes[0].lines
    assert line.get_marker() == "o"


def test_the_global_state_of_matplotlib_is_left_alone(run):
    for figure in draw(read_runs([run])).values():
        to_png(figure)
    assert dict(mpl.rcParams) == BEFORE


def test_neither_torch_nor_pyplot_is_imported_for_a_report(tmp_path):
    code = (
        "import io, pathlib, sys\n"
        "from rich.console import Console\n"
        "from megatron_dsv3.commands.report import run\n"
        "run([pathlib.Path(sys.argv[1])], Console(file=io.StringIO()))\n"
        "print(*{'torch', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, write_run(tmp_path, record(1), record(2))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.split() == []
    assert (tmp_path / "report" / "index.html").is_file()


def test_the_same_run_gives_the_same_bytes(run):
    first, second = (to_png(draw(read_runs([run]))["loss"]) for _ in range(2))
    assert first == second
    assert first.startswith(b"\x89PNG")


# The page


class Page(HTMLParser):
    """Resources, texts and cells of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.resources: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.resources += [v or "" for k, v in attrs if k in ("src", "srcset", "href", "data")]

    def handle_data(self, data: str) -> None:
        self.texts += [data.strip()] if data.strip() else []


def test_the_page_needs_no_other_resource(page):
    text = page.read_text()
    parsed = Page(text)
    assert len(parsed.resources) == 2 * len(TITLES), "each figure, for a light and a dark page"
    assert all(resource.startswith("data:image/png;base64,") for resource in parsed.resources)
    assert not re.search(r"https?:|url\(|@import", text)
    assert not {"script", "link", "iframe"} & set(parsed.tags)
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert LIGHT.background in text
    assert DARK.background in text


def test_the_page_shows_the_png_files_that_lie_beside_it(page):
    shown = {
        base64.b64decode(resource.partition(",")[2])
        for resource in Page(page.read_text()).resources
    }
    files = list(page.parent.glob("*.png"))
    assert {file.stem for file in files} == set(TITLES)
    assert all(file.read_bytes() in shown for file in files)


def test_the_page_has_the_summary_of_every_run(run, tmp_path):
    runs = read_runs([run, write_full_run(tmp_path / "a<b>&c", shift=1.0)])
    text = to_html(runs, {}, {})
    assert "a<b>" not in text
    texts = Page(text).texts
    start = texts.index("Steps")
    assert texts[start : start + 3] == ["Steps", "60 of 100", "60 of 100"]
    start = texts.index("Skipped steps")
    assert texts[start : start + 3] == ["Skipped steps", "1", "1"]
    assert "a<b>&c" in texts


def test_a_report_replaces_the_one_before(tmp_path):
    run = write_run(tmp_path, record(1), record(2))
    (run / "report").mkdir()
    for name in ("index.html", "loss.png", "mine.txt"):
        (run / "report" / name).write_text("old")
    write_report(read_runs([run]), run / "report")
    text = (run / "report" / "index.html").read_text()
    assert Page(text).texts[:1] == [f"Training report: {tmp_path.parent.name}/{tmp_path.name}"]
    assert (run / "report" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "report" / "mine.txt").read_text() == "old"
    assert not list((run / "report").glob("*.tmp"))


def test_an_interrupted_write_leaves_the_file_before(tmp_path, monkeypatch):
    old = tmp_path / "report" / "loss.png"
    old.parent.mkdir()
    old.write_text("old")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match=r"report: cannot be written to \(No space left"):
        write_report(read_runs([write_run(tmp_path, record(1), record(2))]), old.parent)
    assert [(file, file.read_text()) for file in old.parent.iterdir()] == [(old, "old")]


# The command


def shown(directories: list[Path], out: Path | None = None) -> str:
    console = Console(file=io.StringIO(), width=120)
    command.run(directories, console, out=out)
    return console.file.getvalue()


def test_the_command_shows_the_summary_and_where_the_report_is(run):
    text = shown([run])
    assert f"wrote {run}/report/index.html" in text
    assert re.search(r"Steps\W+60 of 100", text)
    assert re.search(r"Skipped steps\W+1\b", text)
    assert (run / "report" / "index.html").is_file()


def test_several_runs_go_where_the_user_says(run, tmp_path):
    other = write_full_run(tmp_path / "other", shift=1.0)
    with pytest.raises(ValueError, match="2 runs have no common place; give one with --out DIR"):
        shown([run, other])
    assert f"wrote {tmp_path}/both/index.html" in shown([run, other], tmp_path / "both")
    assert not (run / "report").exists()


def test_a_place_that_cannot_be_written_to_is_named(run, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match=r"file: cannot be written to \(.*\); give a directory"):
        shown([run], file)
    assert file.read_text() == "mine"


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such directory"):
        shown([tmp_path / "nowhere"])
