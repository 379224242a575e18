"""Imports go down: a folder imports from lower floors, never from a neighbour on its own."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_dsv3"
FLOORS = {
    "cli": 6,
    "commands": 5,
    "serve": 4,
    "launch": 4,
    "train": 3,
    "convert": 3,
    "plan": 3,
    "checkpoint": 3,
    "data": 2,
    "model": 2,
    "config": 1,
}
# They stand on top of the house: each may import anything of the package, which knows none of them.
OUTSIDE = ("tools", "examples", "benchmarks", "tests", "scripts")


def test_imports_go_down():
    assert len(list((ROOT / PACKAGE).rglob("*.py"))) > len(FLOORS), "the package was not found"
    assert not (wrong := violations(ROOT)), "\n".join(wrong)


GOOD = {
    "config/a.py": "import os\nfrom megatron_dsv3.config.b import x",
    "model/a.py": "from megatron_dsv3.config import b\nfrom megatron.core import parallel_state",
    "train/a.py": "import megatron_dsv3.data.a\nfrom megatron_dsv3.model.a import y",
    "cli.py": "def main():\n    from megatron_dsv3.serve.a import z",
}


def test_a_house_in_order_passes(tmp_path):
    build(tmp_path, GOOD | {"../tools/t.py": "from megatron_dsv3.cli import main"})
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "code", "found"),
    [
        ("config/c.py", "import megatron_dsv3.model.a", "config .floor 1. imports model .floor 2."),
        ("model/c.py", "from megatron_dsv3.cli import main", "model .* imports cli"),
        ("model/c.py", "from megatron_dsv3 import data", "model .floor 2. imports data .floor 2."),
        ("train/c.py", "from megatron_dsv3.convert.a import b", "train .* imports convert"),
        ("train/c.py", "def f():\n    import megatron_dsv3.serve.a", "c.py:2: train .* serve"),
        ("serve/c.py", "from megatron_dsv3.launch import a", "serve .* imports launch"),
        ("config/c.py", "from .b import x", "relative"),
        ("config/c.py", "from ..model import a", "relative"),
        ("config/c.py", "from megatron_dsv3.helpers import x", "helpers stands on no floor"),
        ("helpers/c.py", "import os", "helpers stands on no floor"),
        ("helpers.py", "import os", "helpers stands on no floor"),
        ("cli.py", "from tools.checkpoint import convert", "cli .* imports tools"),
        ("model/c.py", "from megatron.training import get_args", "only megatron.core"),
        ("../tools/t.py", "from .convert import x", "relative"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, file, code, found):
    build(tmp_path, GOOD | {file: code})
    with pytest.raises(AssertionError, match=found):
        assert not (wrong := violations(tmp_path)), wrong
    assert len(violations(tmp_path)) == 1


def build(root: Path, files: dict[str, str]) -> None:
    for name, code in files.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)


def violations(root: Path) -> list[str]:
    wrong = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        home = path.relative_to(root / PACKAGE).parts[0].removesuffix(".py")
        if home != "__init__":
            wrong += check(path, root, home)
    for folder in OUTSIDE:
        for path in sorted((root / folder).rglob("*.py")):
            wrong += check(path, root, None)
    return wrong


def check(path: Path, root: Path, home: str | None) -> Iterator[str]:
    """One line per wrong import of `path`; `home` is None for a file that may import anything."""
    where = path.relative_to(root)
    if home is not None and home not in FLOORS:
        yield f"{where}: {home} stands on no floor; find it a place or add it to FLOORS"
        return
    for line, name in imported(path):
        if reason := problem(home, name):
            yield f"{where}:{line}: {reason}"


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, inside functions too; a relative one keeps its dots."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def problem(home: str | None, name: str) -> str | None:
    if name.startswith("."):
        return f"relative import of {name.lstrip('.')}; write megatron_dsv3.<folder>.<module>"
    if home is None:
        return None
    top, *inner = name.split(".")
    if top in OUTSIDE:
        return f"{home} (floor {FLOORS[home]}) imports {top}, which stands on top of the package"
    if top == "megatron" and inner[:1] != ["core"]:
        return f"{home} imports {name}; only megatron.core, as megatron.training lives on globals"
    if top != PACKAGE or not inner or inner[0] == home:
        return None
    target = inner[0]
    if target not in FLOORS:
        return f"{home} imports {name}, but {target} stands on no floor"
    if FLOORS[target] >= FLOORS[home]:
        return f"{home} (floor {FLOORS[home]}) imports {target} (floor {FLOORS[target]})"
    return None
