"""How long kernels take, by shape: looked up in a measured table, transferred to other cards."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from megatron_dsv3.config.yaml_file import read_yaml
from megatron_dsv3.plan.cards import cluster_of
from megatron_dsv3.plan.records import Card

NEAREST = 4
"""Measured shapes that a time in between is taken from."""
MEASURED_WIDTH = 192 + 128
"""Of a key and a value, where a row of attention does not say."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of one kernel and of its backward."""

    forward: float
    backward: float
    origin: str = ""

    def __add__(self, other: "Seconds") -> "Seconds":
        origin = " + ".join(filter(None, (self.origin, other.origin)))
        return Seconds(self.forward + other.forward, self.backward + other.backward, origin)


NOTHING = Seconds(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class _Row:
    """A measured shape, with its times over those at the rate that large products reach."""

    shape: tuple[float, ...]
    forward: float
    backward: float

    @property
    def point(self) -> list[float]:
        """Where it is among shapes: factors of two are steps of one."""
        return [math.log2(size) for size in self.shape]


@dataclass(frozen=True, slots=True)
class Kernels:
    """The table as one card sees it."""

    card: Card
    measured_on: Card
    rows: Mapping[tuple[str, str], Sequence[_Row]]
    """By kind and precision."""
    adam_seconds: Mapping[str, float]
    """Of a parameter's update on the measured card, by the format of the moments."""
    source: str
    _known: dict[tuple[Any, ...], Seconds] = field(default_factory=dict, compare=False, repr=False)

    def product(self, precision: str, tokens: float, n: int, k: int, *, groups: int = 1) -> Seconds:
        """[tokens, k] x [k, n] in each of `groups` experts, forward; both gradients, backward.

        Args:
            precision: bf16, or a format of FP8; of these the table has the blocks.
            tokens: Rows, of each group.
            n: Columns of the result.
            k: Length of the sums.
            groups: Experts; 1: a plain linear.
        """
        kind = "linear" if groups == 1 else "grouped"
        known = "bf16" if precision in ("bf16", "off") else "blockwise"
        key = (kind, known, tokens, n, k, groups)
        if key not in self._known:
            flops = 2.0 * tokens * n * k * groups
            found = self._transferred(kind, known, (tokens, n, k, groups), flops)
            # No faster than its operands come from memory.
            least = 2.0 * groups * (tokens * k + n * k + tokens * n) / (self.card.hbm_gb_s * 1e9)
            self._known[key] = Seconds(
                max(found.forward, least), max(found.backward, 2 * least), found.origin
            )
        return self._known[key]

    def attention(self, *, tokens: float, length: int, heads: int, width: int) -> Seconds:
        """Causal attention over packed documents.

        Args:
            tokens: Of all documents.
            length: Of one document.
            heads: On this rank.
            width: Of a key and a value together, of one head.
        """
        key = ("attention", tokens, length, heads, width)
        if key not in self._known:
            flops = _attention_flops(tokens, length, heads, width)
            self._known[key] = self._transferred("attention", "bf16", (length, heads), flops)
        return self._known[key]

    def adam(self, *, parameters: float, moments: str) -> Seconds:
        """One update of that many parameters with their masters on the GPU."""
        scale = self.measured_on.hbm_gb_s / self.card.hbm_gb_s
        seconds = parameters * self.adam_seconds[moments] * scale
        return Seconds(seconds, 0.0, f"Adam with {moments} moments, by memory bandwidth")

    def _transferred(
        self, kind: str, precision: str, shape: Sequence[float], flops: float
    ) -> Seconds:
        """What exceeds the ideal time goes by memory bandwidth, the ideal by the rate reached."""
        here, there = reached(self.card, precision), reached(self.measured_on, precision)
        memory = self.measured_on.hbm_gb_s / self.card.hbm_gb_s
        near = self._nearest((kind, precision), shape)

        def seconds(share: float, slower: float) -> float:
            ideal = share * flops / here
            loss = (slower - 1) * share * flops / there
            return ideal + loss * memory if loss > 0 else ideal * slower

        # Relative times change slowly with the shape, in their logarithms.
        forward = math.exp(sum(weight * math.log(row.forward) for weight, row in near))
        backward = math.exp(sum(weight * math.log(row.backward) for weight, row in near))
        shapes = ", ".join("x".join(f"{size:g}" for size in row.shape) for _, row in near[:2])
        origin = f"{kind} {precision} from {shapes}"
        return Seconds(seconds(1.0, forward), seconds(2.0, backward), origin)

    def _nearest(self, table: tuple[str, str], shape: Sequence[float]) -> list[tuple[float, _Row]]:
        """Weights that sum to 1, and measured rows, the nearest first."""
        rows = self.rows[table]
        point = [math.log2(size) for size in shape]
        ranked = sorted((math.dist(point, row.point), index) for index, row in enumerate(rows))
        if ranked[0][0] < 1e-9:
            return [(1.0, rows[ranked[0][1]])]
        weights = [(distance**-3, index) for distance, index in ranked[:NEAREST]]
        total = sum(weight for weight, _ in weights)
        return [(weight / total, rows[index]) for weight, index in weights]


def load_kernels(card: Card, path: Path | None = None) -> Kernels:
    """The table that comes with the package, or one of the user's, for a card.

    Raises:
        ValueError: A table without source or rows, or rows of unknown kinds or without times.
    """
    if path is None:
        with as_file(files(__package__) / "kernels.yaml") as shipped:
            return load_kernels(card, shipped)
    content = read_yaml(path)
    missing = [name for name in ("card", "source", "rows") if not content.get(name)]
    if missing:
        raise ValueError(
            f"{path}: no {', '.join(missing)}; benchmarks/gemm_table.py writes a table"
        )
    for number, row in enumerate(content["rows"], start=1):
        if problem := _row_problem(row):
            raise ValueError(f"{path}: row {number}: {problem}")
    measured_on = cluster_of(content["card"]).card
    rows: dict[tuple[str, str], list[_Row]] = defaultdict(list)
    adam = {}
    for row in content["rows"]:
        if row["kind"] == "adam":
            adam[row["precision"]] = row["forward_us"] * 1e-6 / row["parameters"]
        elif row["kind"] != "copy":
            rows[row["kind"], row["precision"]].append(_relative(row, measured_on))
    needed = [("linear", "bf16"), ("grouped", "bf16"), ("attention", "bf16")]
    lost = [" in ".join(pair) for pair in needed if pair not in rows]
    lost += [f"adam with {name} moments" for name in ("fp32", "bf16") if name not in adam]
    if lost:
        raise ValueError(f"{path}: no rows of {', '.join(lost)}")
    return Kernels(card, measured_on, rows, adam, str(content["source"]))


def reached(card: Card, precision: str) -> float:
    """FLOPs a second of large products.

    Raises:
        ValueError: The card has no FP8.
    """
    rate = card.bf16_tflops_reached if precision == "bf16" else card.fp8_tflops_reached
    if rate is None:
        raise ValueError(f"{card.name} has no FP8; set precision.fp8=off")
    return rate * 1e12


_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "linear": ("tokens", "n", "k", "groups", "forward_us", "backward_us"),
    "grouped": ("tokens", "n", "k", "groups", "forward_us", "backward_us"),
    "attention": ("tokens", "length", "heads", "forward_us", "backward_us"),
    "adam": ("parameters", "forward_us"),
    "copy": ("bytes", "forward_us"),
}


def _row_problem(row: Any) -> str | None:
    if not isinstance(row, dict) or row.get("kind") not in _COLUMNS:
        return f"expected a kind of {', '.join(_COLUMNS)}, got {row!r}"
    wrong = [c for c in _COLUMNS[row["kind"]] if not _positive(row.get(c))]
    return f"expected positive numbers for {', '.join(wrong)}, got {row!r}" if wrong else None


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _attention_flops(tokens: float, length: float, heads: float, width: float) -> float:
    """Multiply-adds of queries with keys and of probabilities with values, half of them masked."""
    return heads * width * tokens * (length + 1.0)


def _relative(row: Mapping[str, Any], card: Card) -> _Row:
    shape: tuple[float, ...]
    if row["kind"] == "attention":
        shape = (float(row["length"]), float(row["heads"]))
        width = row.get("width", MEASURED_WIDTH)
        flops = _attention_flops(row["tokens"], row["length"], row["heads"], width)
    else:
        shape = tuple(float(row[name]) for name in ("tokens", "n", "k", "groups"))
        flops = 2.0 * math.prod(shape)
    ideal = flops / reached(card, row["precision"])
    return _Row(shape, row["forward_us"] * 1e-6 / ideal, row["backward_us"] * 1e-6 / (2 * ideal))
