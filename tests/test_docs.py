"""What the documents say is true: commands, settings, flags, files, links."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from doc_commands import CLI, JOB, check, load, our_flags
from documents import PAGES, ROOT, Page, commands

from megatron_dsv3.config.job import Job
from megatron_dsv3.config.section import setting_names
from megatron_dsv3.data.schemas import SCHEMAS, read_chat

SETTINGS = set(setting_names(Job))
SETTING = re.compile(rf"({'|'.join(Job.model_fields)})\.[a-z][a-z0-9_.]*(?==|$)")
LANGUAGES = {"bash", "yaml", "json", "text"}
FOLDERS = (
    "docs|examples|tools|tests|scripts|benchmarks|docker|megatron_dsv3|"
    "config|convert|data|model|train|serve|launch|plan|checkpoint|commands"
)
FILES = ("pkl", "py", "json", "yaml", "png", "sbatch")
FILE = re.compile(rf"({FOLDERS})/[\w./-]+\.(py|sh|md|yaml|env|txt)")
OTHERS = {
    "all": ("--help",),
    "docker": ("--ipc=host", "--user", "--build-arg", "--gpus"),
    "Megatron-LM": ("--tensor-model-parallel-size", "--pipeline-model-parallel-layout"),
    "pip": ("--no-build-isolation", "--no-deps"),
    "pyxis": ("--container-entrypoint",),
    "slurm": ("--nodes", "--account", "--partition"),
    "vLLM": ("--max-num-seqs", "--dtype"),
}
"""Flags in the text that are not ours, by whose they are."""


def name(page: Page) -> str:
    return page.path.relative_to(ROOT).as_posix()


pages = pytest.mark.parametrize("page", [*map(Page.read, PAGES)], ids=name)


# Commands


@pages
def test_every_command_can_be_run_or_says_why_not(page):
    for fence in page.fences:
        if fence.language == "bash":
            for words in commands(fence.text):
                check(words, allowed=fence.reason is not None)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("megatron-dsv3 prepar a", "no such command"),
        ("megatron-dsv3 report a --in b", "--in"),
        ("torchrun --nproc-per-node 2 -m megatron_dsv3.cli train j.yaml optimizer.rate=1", "rate"),
        ("torchrun --fast -m megatron_dsv3.cli train j.yaml", "SystemExit"),
        ("python tools/checkpoint/convert.py --to hf --form a --out b", "SystemExit"),
        ("make quickstrat", "quickstrat"),
        ("bash examples/serve_dsv3_slurm.sh a --nothing", "has no --nothing"),
        ("curl https://example.org", "not run: why"),
    ],
)
def test_a_wrong_command_is_found(line, found):
    [words] = commands(line)
    with pytest.raises(BaseException) as error:  # noqa: PT011 - of many kinds
        check(words, allowed=False)
    said = f"{type(error.value).__name__} {error.value} {getattr(error.value, 'message', '')}"
    assert found in said


def test_commands_are_read_as_a_shell_does():
    text = "A=1 make x  # why\n# no\npip install \\\n  -e '.[dev]' && make y | tee z\n"
    assert [*commands(text)] == [
        ["make", "x"],
        ["pip", "install", "-e", ".[dev]"],
        ["make", "y"],
        ["tee", "z"],
    ]


# What stands in blocks


@pages
def test_blocks_hold_what_they_say(page):
    for fence in page.fences:
        assert fence.language in LANGUAGES, f"```{fence.language}: expected one of {LANGUAGES}"
        if fence.language == "yaml":
            content = yaml.safe_load(fence.text)
            if set(content) <= set(Job.model_fields):
                load(merged(content), [])
        if fence.language == "json":
            for row in rows(fence.text):
                if any(key in row for key in SCHEMAS):
                    read_chat(row)


def merged(content: dict) -> dict:
    """A job from what a block shows of one."""
    sections = {name: dict(values or {}) for name, values in content.items()}
    for name, values in JOB.items():
        given = sections.setdefault(name, {})
        if not (name == "data" and {"paths", "store"} & given.keys()):
            sections[name] = values | given
    return sections


def rows(text: str) -> list[dict]:
    try:
        return [json.loads(text)]
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines()]


@pages
def test_no_command_stands_outside_of_a_block(page):
    found = re.findall(
        r"^ {4,}(?:\w+=\S+ )*(?:python|torchrun|megatron-dsv3|bash|make) .*$",
        page.prose,
        re.MULTILINE,
    )
    assert not found, f"write ```bash around {found}"


# Words in code


@pages
def test_every_setting_that_is_named_exists(page):
    named = {
        found[0]
        for span in page.spans
        for word in span.split()
        if (found := SETTING.match(word)) and not FILE.fullmatch(word)
    }
    wrong = named - SETTINGS - {name for name in named if name.startswith("model.layers")}
    wrong -= {name for name in wrong if name.rpartition(".")[2] in FILES}
    assert not wrong


@pages
def test_every_flag_that_is_named_exists(page):
    known = our_flags() | {flag for flags in OTHERS.values() for flag in flags}
    words = {word for span in page.spans for word in re.findall(r"(?<!\S)--[a-z][\w=-]*", span)}
    wrong = {word for word in words if word not in known and word.partition("=")[0] not in known}
    assert not wrong, "no such flag; another program's goes into OTHERS"


@pages
def test_every_command_that_is_named_exists(page):
    for span in page.spans:
        name, *words = span.split()
        if name == "megatron-dsv3" and words:
            command = CLI
            while (inner := getattr(command, "commands", None)) and words:
                word = words.pop(0)
                if word.startswith("--"):
                    break
                assert word in inner, f"`{span}`: no such command"
                command = inner[word]


@pages
def test_every_file_that_is_named_exists(page):
    for span in page.spans:
        if FILE.fullmatch(span):
            places = (ROOT / span, ROOT / "megatron_dsv3" / span, page.path.parent / span)
            assert any(place.is_file() for place in places), span


# Between pages


@pages
def test_links_lead_somewhere(page):
    for link in page.links:
        target, _, anchor = link.partition("#")
        if re.match(r"https?://", target):
            continue
        path = (page.path.parent / target).resolve() if target else page.path
        assert path.is_relative_to(ROOT), link
        assert path.exists(), link
        if anchor:
            assert anchor in Page.read(path).anchors, link


def test_every_page_can_be_reached_from_the_first():
    seen, new = set(), [ROOT / "README.md"]
    while new:
        page = Page.read(new.pop())
        seen.add(page.path)
        for link in page.links:
            path = (page.path.parent / link.partition("#")[0]).resolve()
            if path.suffix == ".md" and path.is_file() and path not in seen:
                new.append(path)
    assert set(PAGES) <= seen


@pytest.mark.parametrize("readme", ["README.md", "README_zh.md"])
def test_the_layout_names_every_file(readme):
    fences = Page.read(ROOT / readme).fences
    [layout] = [fence.text for fence in fences if fence.text.startswith("megatron_dsv3/\n")]
    listed = subprocess.run(
        ["git", "ls-files", "megatron_dsv3", "tools", "examples", "benchmarks", "scripts"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    files = {Path(line).name for line in listed if not line.endswith("__init__.py")}
    words = set(re.findall(r"[\w.-]+", layout, re.ASCII))
    assert not (missing := files - words), missing


def test_pictures_are_small():
    large = {
        path.name: path.stat().st_size
        for path in (ROOT / "docs").rglob("*")
        if path.suffix in (".png", ".svg") and path.stat().st_size > 150_000
    }
    assert not large


@pytest.mark.slow
def test_the_pictures_are_what_the_code_draws(tmp_path):
    script = ROOT / "scripts" / "draw_docs.py"
    subprocess.run([sys.executable, script, "--out", tmp_path], check=True, capture_output=True)
    drawn = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert len(drawn) == 4
    for name, text in drawn.items():
        assert text == (ROOT / "docs" / "pictures" / name).read_text(), f"run {script.name}: {name}"


def test_the_page_of_settings_is_what_the_records_say():
    script = runpy.run_path(str(ROOT / "scripts" / "write_settings.py"))
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert script["page"]() == text, "run python scripts/write_settings.py"
    assert set(re.findall(r"^\| `([\w.]+)`", text, re.MULTILINE)) == {
        name for name in SETTINGS if "." in name
    }
