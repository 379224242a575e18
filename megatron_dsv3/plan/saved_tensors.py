"""The table of what Transformer Engine's modules hold, as records: `saved_tensors.yaml`."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml

TERMS = frozenset({"input", "output", "row", "gathered", "query", "map"})
PARTS = frozenset({"keeps", "holds", "forward", "backward"})
Coefficients = Mapping[str, float]
"""Bytes by term."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What one kind of module holds and takes; the table's opening says what is what."""

    keeps_input: bool
    keeps_output: bool
    holds: Coefficients
    forward: Coefficients
    backward: Coefficients


def total(coefficients: Coefficients, sizes: Mapping[str, int]) -> int:
    """Bytes for a module of these sizes."""
    return int(sum(each * sizes.get(term, 0) for term, each in coefficients.items()))


def holding(kind: str, precision: str) -> Holding:
    """The row of a kind of module in a precision: bf16, blockwise, tensorwise or mxfp8."""
    rows = _table()[kind]
    row = rows.get(precision, rows.get("any"))
    assert row is not None, (kind, precision)
    return Holding(
        keeps_input="input" in row.get("keeps", ()),
        keeps_output="output" in row.get("keeps", ()),
        holds=row.get("holds", {}),
        forward=row.get("forward", {}),
        backward=row.get("backward", {}),
    )


@functools.cache
def _table() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    text = (files("megatron_dsv3.plan") / "saved_tensors.yaml").read_text()
    table: Mapping[str, Mapping[str, Mapping[str, Any]]] = yaml.safe_load(text)
    for kind, rows in table.items():
        for precision, row in rows.items():
            terms = {term for part in PARTS - {"keeps"} for term in row.get(part, {})}
            assert row.keys() <= PARTS, (kind, precision)
            assert terms <= TERMS, (kind, precision)
    return table
