"""docs/settings.md, from the records that jobs are read into: every setting with its effect.

python scripts/write_settings.py            writes it
python scripts/write_settings.py --check    exit code 1 where it is not what would be written
"""

import argparse
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megatron_dsv3.config.job import Job
from megatron_dsv3.config.section import Section, Unit

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
HEAD = """# Settings of a job

Every setting that a job file can hold, and that `section.name=value` on the command line can
replace. Written by `python scripts/write_settings.py` from the records in `megatron_dsv3/config/`;
`make check` compares. A job that says nothing of a setting has its default; **required** ones have
none. `null` is YAML's for "not given". Relative paths are meant from where the command is started.
"""
KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def main() -> int:
    """Writes or checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    is_check = parser.parse_args().check
    text = page()
    if not is_check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE.name} is not what the records say: run python scripts/write_settings.py")
        return 1
    return 0


def page() -> str:
    """All sections."""
    return "\n".join([HEAD, *(line for name in Job.model_fields for line in section_lines(name))])


def section_lines(name: str) -> Iterator[str]:
    """Heading, purpose and table of a section."""
    section = Job.model_fields[name].annotation
    assert isinstance(section, type)
    assert issubclass(section, Section)
    yield f"## {name}\n\n{one_line(section.__doc__)}\n"
    yield "| setting | value | unit | default | effect |\n|---|---|---|---|---|"
    for key, field in section.model_fields.items():
        effect = one_line(field.description)
        assert effect, f"{name}.{key} has no docstring"
        cells = (f"`{name}.{key}`", kind(field), unit(field), default(field), effect)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def one_line(text: str | None) -> str:
    """A docstring without its line breaks."""
    return " ".join((text or "").split()).replace("<", "&lt;")


def kind(field: FieldInfo) -> str:
    """What may stand there, in words."""
    return kind_of(field.annotation, field.metadata)


def kind_of(annotation: Any, metadata: list[Any]) -> str:
    """The same of a type and what is annotated to it."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        kinds = [kind_of(part, []) for part in get_args(annotation) if part is not type(None)]
        return f"{', '.join(kinds)} or null"
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if origin is tuple:
        return f"list of: {kind_of(get_args(annotation)[0], [])}"
    if hasattr(annotation, "__metadata__"):
        return kind_of(annotation.__origin__, [*annotation.__metadata__])
    bounds = [
        f"{word} {getattr(constraint, bound):g}"
        for constraint in flat(metadata)
        for bound, word in BOUNDS.items()
        if getattr(constraint, bound, None) is not None
    ]
    return " ".join([KINDS[annotation], ", ".join(bounds)]).strip()


def unit(field: FieldInfo) -> str:
    """What its type says it counts."""
    parts = get_args(field.annotation) if get_origin(field.annotation) else ()
    inner = [part for arg in parts for part in getattr(arg, "__metadata__", ())]
    units = [part.name for part in flat([*field.metadata, *inner]) if isinstance(part, Unit)]
    return "".join(units)


def flat(metadata: list[Any]) -> Iterator[Any]:
    """Constraints one by one: pydantic keeps those of a union's part inside a FieldInfo."""
    for part in metadata:
        yield from part.metadata if isinstance(part, FieldInfo) else [part]


def default(field: FieldInfo) -> str:
    """As YAML has it."""
    if field.is_required():
        return "**required**"
    value = field.default
    if isinstance(value, float) and 0 < abs(value) < 1e-2:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"`{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}`"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    sys.exit(main())
