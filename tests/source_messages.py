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
ADVICE = re.compile(
    "; (?:add|allow|ask|change|choose|copy|delete|export|fetch|free|give|in a container|keep|leave|"
    "lower|name|pip install|prepare|put|raise|remove|save|see|set|start|take|try|use|write)\\b"
)
"""A way out, as messages word it that are collected before they are raised or printed."""
SHELL = re.compile(r'(?:\bdie "(?:error: )?([^"]+)"|\b(?:echo|say) "(?:error: )?([^"]+)" >&2)')
VARIABLE = re.compile(r"\$\{[^}]*\}|\$[\w*@#]+")
HELP = {"Option", "Argument"}
"""Whose strings describe the command line."""


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


def advised(root: Path) -> dict[str, str]:
    """Messages that name a way out, wherever they are made, each with its file.

    One that begins with its way out is the end of another.
    """
    return {
        text: path.relative_to(root).as_posix()
        for path in sorted(root.rglob("*.py"))
        for text in map(template, strings(ast.parse(path.read_text(encoding="utf-8"))))
        if ADVICE.search(text) and not text.startswith(";")
    }


def strings(tree: ast.Module) -> Iterator[ast.expr]:
    """Whole strings: no docstring, no part of an f-string, nothing of the command line's help."""
    parts = {id(part) for node in ast.walk(tree) for part in unread(node)}
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if id(node) not in parts and (is_text or isinstance(node, ast.JoinedStr)):
            yield node


def unread(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Expr):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield from node.values
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in HELP:
        yield from ast.walk(node)


def found(root: Path) -> dict[str, str]:
    """What the checks of a directory find (`what` in their code), each with its file."""
    texts = {}
    for path in sorted((root / "serve").glob("*_check.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "what":
                value = node.value.args[0] if isinstance(node.value, ast.Call) else node.value
                texts[template(value)] = path.relative_to(root).as_posix()
    return texts


def said_by_scripts(root: Path) -> dict[str, str]:
    """What the shell scripts below `root` end with or warn of, each with its file."""
    return {
        text: path.relative_to(root).as_posix()
        for path in sorted(root.rglob("*.sh"))
        for groups in SHELL.findall(path.read_text(encoding="utf-8"))
        if sum(map(str.isalpha, text := VARIABLE.sub(FILLED, "".join(groups)))) >= FEWEST_LETTERS
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
