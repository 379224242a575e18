"""YAML as a user writes it: a file with sections, `a.b=c` on the command line, and back to text."""

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

# YAML 1.1, which PyYAML reads, takes 1e-5 for text; YAML 1.2 and everyone else for a number.
_FLOAT_TAG = "tag:yaml.org,2002:float"
_EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+\Z")
_FIRST_CHARACTERS = list("-+.0123456789")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number and `off` as text, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the text 1e-5, so that it is read back as text."""


# YAML 1.1 also takes yes, no, on and off for true and false; here `mode: off` is a word.
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if first in "tTfF" or pair[0] != "tag:yaml.org,2002:bool"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_FLOAT_TAG, _EXPONENT, _FIRST_CHARACTERS)
_Dumper.add_implicit_resolver(_FLOAT_TAG, _EXPONENT, _FIRST_CHARACTERS)


def read_yaml(path: Path) -> dict[str, Any]:
    """Content of a YAML file whose top level is a mapping; an empty file is an empty one.

    Raises:
        ValueError: No such file, YAML that does not parse (with its line), or no mapping.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a YAML file of settings")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from None
    content = _parse(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected sections of settings (name: value), got {type(content).__name__}"
        )
    return content


def with_overrides(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `content` in which each `a.b=c` has replaced or added its value, read as YAML.

    Raises:
        ValueError: An override without `=`, with a value that does not parse, or inside a value.
    """
    merged = dict(content)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r}: expected name=value, as in optimizer.lr=1e-5")
        *sections, leaf = name.split(".")
        inner = merged
        for depth, section in enumerate(sections, start=1):
            # Copied on the way, so that the caller's mapping stays as it is.
            value = inner.get(section)
            value = {} if value is None else value
            if not isinstance(value, dict):
                outer = ".".join(sections[:depth])
                raise ValueError(f"override {override!r}: {outer} is the value {value!r}")
            inner[section] = dict(value)
            inner = inner[section]
        inner[leaf] = _parse(text, f"override {override!r}")
    return merged


def dump_yaml(content: Mapping[str, Any]) -> str:
    """YAML text of plain values, in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{where}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{where}: not valid YAML: {reason}") from None
