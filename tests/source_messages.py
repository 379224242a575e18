"""The texts of a package as templates: what stands in the source, FILLED for what is filled in."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ERRORS = {"ValueError", "FileNotFoundError", "RowError", "SharedError"}
"""What ends as one message with exit code 2."""
FILLED = "\N{HORIZONTAL ELLIPSIS}"
FEWEST_LETTERS = 8
"""Less than that of fixed text is no message, as in f"{path}: {reason}"."""


def raised(root: Path) -> dict[str, str]:
    """Messages of errors that users see, each with the file that has it."""
    found = {}
    for path, node in calls(root):
        if isinstance(node.func, ast.Name) and node.func.id in ERRORS and node.args:
            text = template(node.args[-1])
            if sum(map(str.isalpha, text)) >= FEWEST_LETTERS:
                found[text] = path
    return found


def texts(root: Path) -> set[str]:
    """All strings of the source, those of collected problems included."""
    return {
        template(node)
        for path in sorted(root.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant | ast.JoinedStr)
    }


def calls(root: Path) -> Iterator[tuple[str, ast.Call]]:
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path.relative_to(root).as_posix(), node


def template(node: ast.expr) -> str:
    """Fixed text as it stands, one line; everything else is FILLED."""
    if isinstance(node, ast.Constant):
        text = str(node.value)
    elif isinstance(node, ast.JoinedStr):
        text = "".join(template(part) for part in node.values)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        text = template(node.left) + template(node.right)
    else:
        return FILLED
    while FILLED * 2 in text:
        text = text.replace(FILLED * 2, FILLED)
    return re.sub(r"\s*\n\s*", " ", text)
