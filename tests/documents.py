"""The project's documents as records: fences, commands, headings, links, words in code."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "docs/zh/*.md", "docker/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
ASSIGNMENT = re.compile(r"[A-Z_]+=.*")


@dataclass(frozen=True, slots=True)
class Fence:
    """A block of code; `reason` says why its commands can't be run here."""

    language: str
    text: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class Page:
    """A Markdown file."""

    path: Path
    text: str

    @classmethod
    def read(cls, path: Path) -> "Page":
        return cls(path, path.read_text(encoding="utf-8"))

    @property
    def fences(self) -> list[Fence]:
        return [
            Fence(found["language"], found["text"], found["reason"])
            for found in FENCE.finditer(self.text)
        ]

    @property
    def prose(self) -> str:
        """Without blocks of code."""
        return FENCE.sub("", self.text)

    @property
    def spans(self) -> list[str]:
        """Code within the prose."""
        return [found[2].strip() for found in SPAN.finditer(self.prose)]

    @property
    def headings(self) -> list[tuple[int, str]]:
        return [(len(marks), text) for marks, text in HEADING.findall(self.prose)]

    @property
    def anchors(self) -> set[str]:
        """What a link can point to, as the pages are rendered."""
        return {
            re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for _, text in self.headings
        }

    @property
    def links(self) -> list[str]:
        return LINK.findall(self.prose)


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a block of bash, as words, one after another."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if word in ("&&", "|", ";", "||"):
                yield from [words] if words else []
                words = []
            elif words or not ASSIGNMENT.fullmatch(word):
                words.append(word)
        yield from [words] if words else []
