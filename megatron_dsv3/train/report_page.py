"""The page of a report: summary and figures in one HTML file that needs no other and no network."""

import base64
import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from megatron_dsv3.train.report import DARK, LIGHT, TITLES, Theme, draw, to_png
from megatron_dsv3.train.run_log import RunLog, summary

PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training report: $names</title>
<style>
:root { color-scheme: light dark; $light }
@media (prefers-color-scheme: dark) { :root { $dark } }
* { box-sizing: border-box }
body {
  margin: 0; background: var(--background); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 84rem; margin: 0 auto; padding: clamp(1rem, 4vw, 3rem) }
h1 { margin: 0; font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; letter-spacing: -.015em }
header p { margin: .3rem 0 0; color: var(--muted); overflow-wrap: anywhere }
.summary { margin: 2rem 0 2.5rem; overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .4rem 0 .4rem 2rem; text-align: right; border-bottom: 1px solid var(--grid) }
th:first-child, td:empty {
  position: sticky; left: 0; padding-left: 0; text-align: left; background: var(--background);
}
tbody th { color: var(--muted); font-weight: 400 }
tbody td { font-weight: 600; white-space: nowrap }
.one, .one tbody { display: block }
.one tbody {
  display: grid; gap: 0 3rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr));
}
.one tr { display: flex; justify-content: space-between; border-bottom: 1px solid var(--grid) }
.one th, .one td { border: 0 }
.figures {
  display: grid; gap: 2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 32rem), 1fr));
}
figure { margin: 0 }
img { display: block; width: 100%; height: auto }
</style>
</head>
<body>
<main>
<header>
<h1>Training report</h1>
<p>$names</p>
</header>
<div class="summary">
$table
</div>
<div class="figures">
$figures
</div>
</main>
</body>
</html>
""")


def write_report(runs: Sequence[RunLog], directory: Path) -> Path:
    """Writes a PNG of each figure and `index.html`, whose path is returned.

    Raises:
        ValueError: There are too many runs, or the directory cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in _files(runs).items():
            _replace(directory / name, content)
    except OSError as error:
        raise ValueError(
            f"{directory}: cannot be written to ({error.strerror}); give a directory with --out DIR"
        ) from None
    return directory / "index.html"


def _files(runs: Sequence[RunLog]) -> dict[str, bytes]:
    light, dark = (
        {name: to_png(figure) for name, figure in draw(runs, theme).items()}
        for theme in (LIGHT, DARK)
    )
    page = to_html(runs, light, dark).encode()
    return {f"{name}.png": png for name, png in light.items()} | {"index.html": page}


def _replace(path: Path, content: bytes) -> None:
    """In one go: somebody may be looking at the report of a running job."""
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def to_html(runs: Sequence[RunLog], light: Mapping[str, bytes], dark: Mapping[str, bytes]) -> str:
    """The page. `light` and `dark` hold the same figures by name, as PNG for either background."""
    return PAGE.substitute(
        names=html.escape(", ".join(run.name for run in runs)),
        light=_variables(LIGHT),
        dark=_variables(DARK),
        table=_table(runs),
        figures="\n".join(_figure(TITLES[name], light[name], dark[name]) for name in light),
    )


def _variables(theme: Theme) -> str:
    names = ("background", "text", "muted", "grid")
    return " ".join(f"--{name}: {getattr(theme, name)};" for name in names)


def _table(runs: Sequence[RunLog]) -> str:
    """Runs are columns; one alone needs no head, and its rows go side by side on a wide page."""
    summaries = [summary(run) for run in runs]
    one = len(runs) == 1
    names = "".join(f'<th scope="col">{html.escape(run.name)}</th>' for run in runs)
    head = f"<table><thead><tr><td></td>{names}</tr></thead><tbody>"
    lines = ['<table class="one"><tbody>' if one else head]
    for label in summaries[0]:
        cells = "".join(f"<td>{html.escape(texts[label])}</td>" for texts in summaries)
        lines.append(f'<tr><th scope="row">{html.escape(label)}</th>{cells}</tr>')
    return "\n".join([*lines, "</tbody></table>"])


def _figure(title: str, light: bytes, dark: bytes) -> str:
    return (
        "<figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark)}">'
        f'<img src="{_data_uri(light)}" alt="{title}"></picture></figure>'
    )


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
