"""What an export cost in accuracy: relative error of each kind of tensor, the worst ones named.

Figures of one shard travel as plain values, so that a report is complete although several
processes, one after the other or on several nodes, wrote the shards.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any, Self

REPORT = "conversion_errors.json"
_NUM_WORST = 10


@dataclass(frozen=True, slots=True)
class Error:
    """How far what was stored is from what was read; zero where nothing changed."""

    squares: float = 0.0
    """Sum of the squared differences."""
    norm: float = 0.0
    """Sum of the squares of what was read."""
    num_blocks: int = 0
    """Of FP8."""
    num_kept: int = 0
    """Blocks that have the original checkpoint's bytes."""

    @classmethod
    def total(cls, errors: Iterable["Error"]) -> "Error":
        """All of them as of one tensor."""
        columns = zip(*map(astuple, errors), strict=True)
        squares, norm, num_blocks, num_kept = [sum(column) for column in columns]
        return cls(squares, norm, int(num_blocks), int(num_kept))

    @property
    def relative(self) -> float:
        """Length of the difference, where what was read has length 1."""
        return float((self.squares / self.norm) ** 0.5) if self.norm else 0.0


@dataclass(frozen=True, slots=True)
class TensorError:
    """The error of one tensor."""

    name: str
    kind: str
    """The name without layer and expert."""
    error: Error


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """Errors of all tensors."""

    tensors: tuple[TensorError, ...]

    @classmethod
    def merged(cls, shards: Iterable[Iterable[Mapping[str, Any]]]) -> Self:
        """Undoes `to_rows`, for all shards."""
        rows = [row for shard in shards for row in shard]
        return cls(tuple([TensorError(r["name"], r["kind"], Error(*r["error"])) for r in rows]))

    def kinds(self) -> dict[str, Error]:
        """The error of all tensors of a kind together, the largest first."""
        groups: dict[str, list[Error]] = defaultdict(list)
        for tensor in self.tensors:
            groups[tensor.kind].append(tensor.error)
        totals = {kind: Error.total(errors) for kind, errors in groups.items()}
        return dict(sorted(totals.items(), key=lambda item: -item[1].relative))

    def worst(self) -> list[TensorError]:
        """The ten tensors with the largest error; those without any are left out."""
        ranked = sorted(self.tensors, key=lambda tensor: -tensor.error.relative)
        return [tensor for tensor in ranked[:_NUM_WORST] if tensor.error.relative]

    def to_json(self) -> dict[str, Any]:
        """Kinds and worst tensors with their errors."""
        return {
            "kinds": {kind: _row(error) for kind, error in self.kinds().items()},
            "worst": [{"name": t.name} | _row(t.error) for t in self.worst()],
        }


def to_rows(errors: Iterable[TensorError]) -> list[dict[str, Any]]:
    """Plain values of one shard's tensors."""
    return [{"name": e.name, "kind": e.kind, "error": list(astuple(e.error))} for e in errors]


def _row(error: Error) -> dict[str, Any]:
    return {
        "relative_error": error.relative,
        "blocks": error.num_blocks,
        "blocks_kept": error.num_kept,
    }
