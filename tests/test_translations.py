"""The Chinese pages say what the English ones do: structure, commands, code, numbers, links."""

import re
from collections import Counter
from decimal import Decimal

import pytest
import yaml
from documents import ROOT, Page, commands

CHINESE = ROOT / "docs" / "zh"
SAY_MORE = {"settings.md", "troubleshooting.md"}
"""Pages whose messages stay in English: the Chinese beside one says again what it names."""
PAGES = sorted(path.name for path in CHINESE.glob("*.md"))
NUMBER = re.compile(r"(?<![\w.])(\d[\d,]*(?:\.\d+)?(?:e-?\d+)?)(?: ?(million|billion|B\b|万|亿))?")
UNITS = {"": 1, "万": 10**4, "million": 10**6, "亿": 10**8, "billion": 10**9, "B": 10**9}

TERMS = {"重算": "重计算", "下放": "卸载", "micro-batch": "微批次"}
"""Words for which the pages have settled on another."""

pages = pytest.mark.parametrize("name", PAGES)
READMES = ("README.md", "docker/README.md")
all_pages = pytest.mark.parametrize("name", [*READMES, *PAGES])


def both(name: str) -> tuple[Page, Page]:
    """A page in English and in Chinese."""
    if name in READMES:
        return Page.read(ROOT / name), Page.read((ROOT / name).with_stem("README_zh"))
    return Page.read(ROOT / "docs" / name), Page.read(CHINESE / name)


def test_every_page_is_there_in_chinese():
    english = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert english == set(PAGES)


@all_pages
def test_both_languages_have_the_same_parts(name):
    ours, theirs = map(parts, both(name))
    for what in ours:
        assert ours[what] == theirs[what], what


@all_pages
def test_every_paragraph_and_row_holds_the_same_numbers_and_code(name):
    ours, theirs = both(name)
    for block, translated in zip(pieces(ours), pieces(theirs), strict=True):
        for read in (numbers, code):
            said, repeated = Counter(read(block)), Counter(read(translated))
            assert not said - repeated, translated
            assert name in SAY_MORE or not repeated - said, translated


@all_pages
def test_one_thing_has_one_word(name):
    words = re.sub(r"`[^`]*`", "", both(name)[1].prose)
    found = {term: instead for term, instead in TERMS.items() if term in words}
    assert not found


@pages
def test_each_language_leads_to_the_other_and_else_to_its_own(name):
    ours, theirs = both(name)
    assert f"zh/{name}" in ours.links
    assert f"../{name}" in theirs.links
    translated = {f"../{page}" for page in PAGES}
    wrong = {link for link in theirs.links if link.partition("#")[0] in translated}
    assert wrong == {f"../{name}"}, "link the Chinese page"
    assert targets(ours) == targets(theirs)


def test_the_chinese_readme_leads_to_chinese_pages():
    links = {link.partition("#")[0] for link in Page.read(ROOT / "README_zh.md").links}
    assert not links & {f"docs/{name}" for name in PAGES}
    assert {f"docs/zh/{name}" for name in PAGES} <= links


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("20 亿参数", 2 * 10**9),
        ("2 B parameters", 2 * 10**9),
        ("about 800,000 samples", 8 * 10**5),
        ("约 80 万样本", 8 * 10**5),
        ("2e-7", Decimal("2e-7")),
    ],
)
def test_numbers_are_read_in_both_languages(text, value):
    assert numbers(text) == [value]


def parts(page: Page) -> dict[str, list]:
    """What a page is made of, apart from words."""
    text = {
        language: [fence.text for fence in page.fences if fence.language == language]
        for language in ("bash", "yaml")
    }
    return {
        "headings": [level for level, _ in page.headings],
        "commands": [[*commands(block)] for block in text["bash"]],
        "jobs": [yaml.safe_load(block) for block in text["yaml"]],
        "blocks": [fence.language for fence in page.fences],
        "tables": [len(re.findall(r"(?<!\\)\|", row)) for row in table_rows(page)],
        "blocks of text": [kind(block) for block in blocks(page)],
        "items": re.findall(r"^[-*] ", page.prose, re.MULTILINE),
    }


def blocks(page: Page) -> list[str]:
    """What blank lines separate, without code."""
    return [block for block in re.split(r"\n\s*\n", page.prose) if block.strip()]


def pieces(page: Page) -> list[str]:
    """The same, with tables row by row."""
    return [
        piece
        for block in blocks(page)
        for piece in (block.splitlines() if kind(block) == "table" else [block])
    ]


def kind(block: str) -> str:
    """Of a paragraph, by how it begins."""
    first = block.strip()[0]
    return {"#": "heading", "|": "table", "-": "list", "!": "picture"}.get(first, "text")


def table_rows(page: Page) -> list[str]:
    return [piece for piece in pieces(page) if piece.startswith("|")]


def numbers(text: str) -> list[Decimal]:
    """What is written in digits; words for large units are multiplied in."""
    return [
        Decimal(found[1].replace(",", "")) * UNITS[found[2] or ""]
        for found in NUMBER.finditer(text)
    ]


def code(text: str) -> list[str]:
    return re.findall(r"(?<!`)`([^`]+)`", text)


def targets(page: Page) -> set[str]:
    """Files that a page links to, by name; the page itself and its other language left out."""
    paths = (link.partition("#")[0].replace("README_zh", "README") for link in page.links)
    names = {path.rpartition("/")[2] for path in paths}
    return names - {page.path.name, ""}
