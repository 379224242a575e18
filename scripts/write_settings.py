"""docs/settings.md and its Chinese page, from the records that jobs are read into.

python scripts/write_settings.py            writes them
python scripts/write_settings.py --check    exit code 1 where they are not what would be written

The English texts are the records' docstrings. settings_zh.yaml holds the Chinese ones, each beside
the English text that it translates, so that one which was changed since is found by its name.
"""

import argparse
import json
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megatron_dsv3.config.job import Job
from megatron_dsv3.config.section import Section, Unit
from megatron_dsv3.config.yaml_file import read_yaml

DOCS = Path(__file__).resolve().parents[1] / "docs"
CATALOGUE = Path(__file__).with_name("settings_zh.yaml")
HEAD = """\
Every setting that a job file can hold, and that `section.name=value` on the command line can
replace. Written by `python scripts/write_settings.py` from the records in `megatron_dsv3/config/`;
`make check` compares. A job that says nothing of a setting has its default; **required** ones have
none. `null` is YAML's for "not given". Relative paths are meant from where the command is started.
"""
KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
COLUMNS = ("setting", "value", "unit", "default", "effect")


class English:
    """The language of the records: every text stands for itself."""

    path = DOCS / "settings.md"
    other = "[\N{CJK UNIFIED IDEOGRAPH-4E2D}\N{CJK UNIFIED IDEOGRAPH-6587}](zh/settings.md)"

    def word(self, english: str) -> str:
        """A word of the tables."""
        return english

    def text(self, key: str, english: str) -> str:
        """A sentence: the head of the page, a section's purpose, a setting's effect."""
        return english

    def problems(self) -> list[str]:
        """What is wrong with the texts that were asked for."""
        return []


class Chinese(English):
    """Texts of a catalogue; what is missing in it, changed or left over is noted."""

    path = DOCS / "zh" / "settings.md"
    other = "[English](../settings.md)"

    def __init__(self, catalogue: Mapping[str, Any]) -> None:
        """`catalogue`: `words` by English word; `texts` by key, with `en` and `zh`."""
        self.words, self.texts = catalogue["words"], catalogue["texts"]
        self.asked: dict[str, str] = {}

    def word(self, english: str) -> str:
        """Its translation; itself where there is none, which `problems` tells."""
        self.asked[f"words.{english}"] = english
        return self.words.get(english, english)

    def text(self, key: str, english: str) -> str:
        """Its translation; itself where there is none, which `problems` tells."""
        self.asked[f"texts.{key}"] = english
        return self.texts.get(key, {}).get("zh") or english

    def problems(self) -> list[str]:
        """A line for each key that has no translation, that of another text, or no use."""
        entries = {f"words.{key}": {"en": key, "zh": zh} for key, zh in self.words.items()}
        entries |= {f"texts.{key}": entry for key, entry in self.texts.items()}
        lines = [f"{key}: no longer asked for; remove it" for key in entries.keys() - self.asked]
        for key, english in self.asked.items():
            entry = entries.get(key, {})
            if not entry.get("zh"):
                lines.append(f"{key}: no translation of: {english}")
            elif entry.get("en") != english:
                lines.append(f"{key}: translates another text than: {english}")
        return [f"{CATALOGUE.name}: {line}" for line in sorted(lines)]


def main() -> int:
    """Writes or checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    is_check = parser.parse_args().check
    problems = []
    for language in (English(), Chinese(read_yaml(CATALOGUE))):
        text = page(language)
        problems += language.problems()
        if not is_check:
            language.path.write_text(text, encoding="utf-8")
        elif not language.path.is_file() or language.path.read_text(encoding="utf-8") != text:
            name = language.path.relative_to(DOCS.parent)
            problems.append(f"{name} is not what the records say: run scripts/write_settings.py")
    print("\n".join(problems), end="\n" if problems else "")
    return int(bool(problems))


def page(language: English | None = None) -> str:
    """All sections; in English where no other language is given."""
    language = language or English()
    head = language.text("page", one_line(HEAD))
    sections = (line for name in Job.model_fields for line in section_lines(name, language))
    title = f"# {language.word('Settings of a job')}"
    return "\n".join([title, "", language.other, "", head, "", *sections])


def section_lines(name: str, language: English) -> Iterator[str]:
    """Heading, purpose and table of a section."""
    section = Job.model_fields[name].annotation
    assert isinstance(section, type)
    assert issubclass(section, Section)
    yield f"## {name}\n\n{language.text(name, one_line(section.__doc__))}\n"
    yield row([language.word(column) for column in COLUMNS])
    yield "|---" * len(COLUMNS) + "|"
    for key, field in section.model_fields.items():
        effect = one_line(field.description)
        assert effect, f"{name}.{key} has no docstring"
        translated = language.text(f"{name}.{key}", effect).replace("<", "&lt;")
        values = (kind(field, language), unit(field, language), default(field, language))
        yield row([f"`{name}.{key}`", *values, translated])
    yield ""


def row(cells: list[str]) -> str:
    """Of a table; an upright stroke would end a cell."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def one_line(text: str | None) -> str:
    """A docstring without its line breaks."""
    return " ".join((text or "").split())


def kind(field: FieldInfo, language: English) -> str:
    """What may stand there, in words."""
    return kind_of(field.annotation, field.metadata, language)


def kind_of(annotation: Any, metadata: list[Any], language: English) -> str:
    """The same of a type and what is annotated to it."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        kinds = [kind_of(part, [], language) for part in parts]
        return f"{language.word(', ').join(kinds)} {language.word('or null')}"
    if origin is Literal:
        return language.word(", ").join(f"`{choice}`" for choice in get_args(annotation))
    if origin is tuple:
        return language.word("list of: ") + kind_of(get_args(annotation)[0], [], language)
    if hasattr(annotation, "__metadata__"):
        return kind_of(annotation.__origin__, [*annotation.__metadata__], language)
    bounds = [
        f"{language.word(word)} {getattr(constraint, bound):g}"
        for constraint in flat(metadata)
        for bound, word in BOUNDS.items()
        if getattr(constraint, bound, None) is not None
    ]
    return " ".join([language.word(KINDS[annotation]), ", ".join(bounds)]).strip()


def unit(field: FieldInfo, language: English) -> str:
    """What its type says it counts."""
    parts = get_args(field.annotation) if get_origin(field.annotation) else ()
    inner = [part for arg in parts for part in getattr(arg, "__metadata__", ())]
    units = [part.name for part in flat([*field.metadata, *inner]) if isinstance(part, Unit)]
    return "".join(language.word(name) for name in units)


def flat(metadata: list[Any]) -> Iterator[Any]:
    """Constraints one by one: pydantic keeps those of a union's part inside a FieldInfo."""
    for part in metadata:
        yield from part.metadata if isinstance(part, FieldInfo) else [part]


def default(field: FieldInfo, language: English) -> str:
    """As YAML has it."""
    if field.is_required():
        return f"**{language.word('required')}**"
    value = field.default
    if isinstance(value, float) and 0 < abs(value) < 1e-2:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"`{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}`"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    sys.exit(main())
