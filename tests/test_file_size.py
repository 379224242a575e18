"""Files that a reader takes in at one sitting, empty `__init__.py`, ASCII outside literals."""

import ast
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("megatron_dsv3", "tools", "examples", "benchmarks", "scripts")
MAX_LINES = 400
# DeepSeek's special tokens are not ASCII: string literals may hold anything.
LITERALS = {tokenize.STRING, tokenize.FSTRING_MIDDLE}


def test_files_are_short_plain_and_their_packages_empty():
    assert list((ROOT / "megatron_dsv3").rglob("*.py")), "the package was not found"
    assert not (wrong := violations(ROOT)), "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("tools/a.py", "x = 1\n" * 401, "a.py: 401 lines"),
        ("megatron_dsv3/data/__init__.py", '"""Data."""\n', "__init__.py: not empty"),
        ("megatron_dsv3/a.py", "x = 1  # a \u2192 b\n", "a.py:1: not ASCII: # a"),
        ("megatron_dsv3/a.py", "x = 1\n\ny\u00e4 = 2\n", "a.py:3: not ASCII"),
        ("megatron_dsv3/a.py", 'def f():\n    """Caf\u00e9."""\n', "a.py:2: not ASCII: Caf"),
    ],
)
def test_a_wrong_file_is_found(tmp_path, file, text, found):
    build(tmp_path, {file: text})
    with pytest.raises(AssertionError, match=found):
        assert not (wrong := violations(tmp_path)), wrong


def test_special_tokens_in_literals_and_400_lines_pass(tmp_path):
    token = 'USER = "<\uff5cUser\uff5c>"\nx = f"<\uff5c{USER}"\n'
    build(tmp_path, {"megatron_dsv3/a.py": token, "megatron_dsv3/__init__.py": ""})
    build(tmp_path, {"tools/b.py": "x = 1\n" * 400})
    assert violations(tmp_path) == []


def build(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def violations(root: Path) -> list[str]:
    files = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    return [f"{path.relative_to(root)}{problem}" for path in files for problem in check(path)]


def check(path: Path) -> Iterator[str]:
    text = path.read_text()
    num_lines = len(text.splitlines())
    if num_lines > MAX_LINES:
        yield f": {num_lines} lines, at most {MAX_LINES}; are there two things in it?"
    if path.name == "__init__.py" and text:
        yield ": not empty; importing a package does no work and offers no second path to a name"
    if not text.isascii():
        yield from (f":{line}: not ASCII: {shown}" for line, shown in not_ascii(path, text))


def not_ascii(path: Path, text: str) -> Iterator[tuple[int, str]]:
    with tokenize.open(path) as source:
        for token in tokenize.generate_tokens(source.readline):
            if token.type not in LITERALS and not token.string.isascii():
                yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node) or ""
            if not docstring.isascii():
                yield node.body[0].lineno, docstring.splitlines()[0]
