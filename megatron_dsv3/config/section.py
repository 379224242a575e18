"""The base of the records that a user writes, and what is wrong with them in a line each."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class Section(BaseModel):
    """A frozen record of settings; the docstring under a field becomes its description."""

    # Strict: 1 is no bool, "8" is no int, and 0.5 steps are refused instead of rounded.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


@dataclass(frozen=True, slots=True)
class Unit:
    """In what a setting counts; stands in its type, for the documentation."""

    name: str


def setting_names(section: type[Section]) -> list[str]:
    """Dotted names of all settings of a section and the sections in it, the sections included."""
    names = []
    for name, info in section.model_fields.items():
        names.append(name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            names += [f"{name}.{inner}" for inner in setting_names(info.annotation)]
    return names


def problem_lines(error: ValidationError, section: type[Section]) -> list[tuple[str, str]]:
    """(dotted name, what is wrong with it) for every problem; an unknown name gets the nearest."""
    names = setting_names(section)
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        lines += [(name, text) for text in _texts(name, problem, names)]
    return lines


_WANTED: Mapping[str, str] = {
    "path_type": "a path",
    "model_type": "a section of settings",
    "tuple_type": "a list, as in [a, b]",
    "invalid_key": "the name of a setting",
}
"""What pydantic's kinds of error ask for, where its own words are no help to a user."""


def _texts(name: str, problem: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    kind, message = problem["type"], problem["msg"]
    if kind == "extra_forbidden":
        yield f"unknown setting; {_nearest(name, names)}"
    elif kind == "missing":
        yield f"missing, and it has no default; add it to the job or give {name}=VALUE"
    elif kind == "value_error":
        yield from str(problem["ctx"]["error"]).splitlines()
    else:
        wanted = _WANTED.get(kind, message.removeprefix("Input should be "))
        yield f"must be {wanted}, got {problem['input']!r}"


def _nearest(name: str, names: Sequence[str]) -> str:
    """Points to what the user may have meant: the same name elsewhere, or one like it."""
    section, _, leaf = name.rpartition(".")
    peers = [known.rpartition(".")[2] for known in names if known.rpartition(".")[0] == section]
    prefix = f"{section}." if section else ""
    elsewhere = [known for known in names if known.rpartition(".")[2] == leaf]
    longer = [peer for peer in peers if peer.startswith(leaf)]
    near = [prefix + peer for peer in longer or difflib.get_close_matches(leaf, peers, n=1)]
    if alike := elsewhere or near:
        return f"did you mean {alike[0]}?"
    return f"known here are {', '.join(peers)}"
