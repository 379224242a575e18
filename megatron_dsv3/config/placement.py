"""Which layers live on which pipeline stage, as rows of data: derived by cost, or from a string.

A string lists the chunks in the order in which a token passes them, parted by `|`: `E` the
embedding, `t` a decoder layer, `m` an MTP layer, `L` head and loss, `-` a chunk that is
meant to be empty. `*n` repeats a letter or a group in parentheses: `Et*4|(t*4|)*14t|mL`. Chunk c is
chunk `c // pp_size` of pipeline stage `c % pp_size`.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_dsv3.config.architecture import Architecture
from megatron_dsv3.config.counts import UnitFlops, unit_flops
from megatron_dsv3.config.parallel import Parallel

BALANCED_FOR_SEQ_LENGTH = 4096
"""Context at which the derived placement weighs attention against the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One model chunk: what the rank `pp_rank` of the pipeline holds as its chunk `vpp_rank`."""

    pp_rank: int
    vpp_rank: int
    has_embedding: bool
    layers: tuple[int, ...]
    """Decoder layers, counted over the whole model."""
    mtp_layers: tuple[int, ...]
    """MTP layers, counted from 0; MTP layer 0 is `model.layers.{num_layers}` in Hugging Face's
    names."""
    has_final_norm: bool
    """Whether the norm after the last decoder layer is here: Megatron-Core keeps it with that layer
    where there is MTP, which reads what it gives, and else with the loss."""
    has_loss: bool
    """Whether the head and the loss are here."""

    @property
    def letters(self) -> str:
        """This chunk in the string form."""
        text = "E" * self.has_embedding + "t" * len(self.layers) + "m" * len(self.mtp_layers)
        return text + "L" * self.has_loss or "-"


@functools.cache
def place(arch: Architecture, parallel: Parallel) -> tuple[Stage, ...]:
    """All chunks in the order in which a token passes them.

    Where the layout has no `stages` of its own, the costliest chunk is made as cheap as it can be,
    and the others as even as that allows. MTP then stays with the loss, whose head it uses.

    Raises:
        ValueError: The string does not place this model, or there are more chunks than layers.
    """
    if problems := parallel.depth_problems(arch):
        raise ValueError("; ".join(problems))
    chunks = (
        _derive(arch, parallel.num_chunks)
        if parallel.stages is None
        else _read(parallel.stages, arch, parallel)
    )
    return tuple(_number(chunks, arch, parallel.pp_size))


def mtp_stage(stages: Sequence[Stage]) -> int | None:
    """Pipeline rank that holds the MTP layers; None: there are none."""
    return next((stage.pp_rank for stage in stages if stage.mtp_layers), None)


def mcore_layout(stages: Sequence[Stage]) -> list[list[str]]:
    """The same in Megatron-Core's words, for `pipeline_model_parallel_layout`."""
    return [
        ["embedding"] * stage.has_embedding
        + ["decoder"] * len(stage.layers)
        + ["mtp"] * len(stage.mtp_layers)
        + ["loss"] * stage.has_loss
        for stage in stages
    ]


def stage_costs(arch: Architecture, stages: Sequence[Stage], seq_length: int) -> list[float]:
    """Each chunk's share of the model's FLOPs; they sum to 1."""
    flops = unit_flops(arch, seq_length)
    costs = [
        sum(_layer_cost(arch, layer, flops) for layer in stage.layers)
        + len(stage.mtp_layers) * flops.mtp_layer
        + stage.has_loss * (1 + arch.num_mtp_layers) * flops.head
        for stage in stages
    ]
    return [cost / sum(costs) for cost in costs]


def _layer_cost(arch: Architecture, layer: int, flops: UnitFlops) -> int:
    return flops.moe_layer if arch.is_moe_layer(layer) else flops.dense_layer


def _derive(arch: Architecture, num_chunks: int) -> list[str]:
    flops = unit_flops(arch, BALANCED_FOR_SEQ_LENGTH)
    costs = [_layer_cost(arch, layer, flops) for layer in range(arch.num_layers)]
    depth = arch.num_mtp_layers
    tail = depth * flops.mtp_layer + (1 + depth) * flops.head
    counts = _partition(costs, num_chunks, tail)
    chunks = ["t" * count for count in counts]
    chunks[0] = "E" + chunks[0]
    chunks[-1] += "m" * depth + "L"
    return chunks


def _partition(costs: Sequence[int], num_chunks: int, tail: int) -> list[int]:
    """Layers of each chunk: contiguous, the largest cost smallest, then the squares' sum.

    Every chunk has a layer but the last, which has `tail` in any case.
    """
    total = list(itertools.accumulate(costs, initial=0))
    # best[end]: (largest cost, sum of squares, start) of the last chunk so far, ending there.
    best: dict[int, tuple[int, int, int]] = {0: (0, 0, 0)}
    rows = []
    for chunk in range(num_chunks):
        is_last = chunk == num_chunks - 1
        row: dict[int, tuple[int, int, int]] = {}
        for start, (largest, squares, _) in best.items():
            ends = [len(costs)] if is_last else range(start + 1, len(costs) + 1)
            for end in ends:
                cost = total[end] - total[start] + tail * is_last
                option = (max(largest, cost), squares + cost**2, start)
                if end not in row or option < row[end]:
                    row[end] = option
        rows.append(row)
        best = row
    counts, end = [], len(costs)
    for row in reversed(rows):
        start = row[end][2]
        counts.append(end - start)
        end = start
    return counts[::-1]


_TOKEN = re.compile(r"([EtmL|-])(?:\*(\d+))?|\(([^()]*)\)\*(\d+)|[,\s]+")


def _read(text: str, arch: Architecture, parallel: Parallel) -> list[str]:
    chunks = _expand(text).split("|")
    problems = _string_problems(chunks, arch, parallel)
    if problems:
        raise ValueError(f"stages {text!r}: " + "; ".join(problems))
    return [chunk.replace("-", "") for chunk in chunks]


def _expand(text: str) -> str:
    """Writes out all repetitions.

    Raises:
        ValueError: A character that means nothing, with its place.
    """
    result, at = "", 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise ValueError(
                f"stages {text!r}: {text[at]!r} at character {at + 1} means nothing; expected E, "
                f"t, m, L, - or |, a repetition as in t*4, or a group as in (t*4|)*3"
            )
        letter, times, group, group_times = token.groups()
        result += (letter or "") * int(times or 1) + _expand(group or "") * int(group_times or 1)
        at = token.end()
    return result


def _string_problems(chunks: Sequence[str], arch: Architecture, parallel: Parallel) -> list[str]:
    letters = "".join(chunks).replace("-", "")
    wanted = {"E": 1, "t": arch.num_layers, "m": arch.num_mtp_layers, "L": 1}
    problems = [
        f"expected {count} x {letter}, got {letters.count(letter)}"
        for letter, count in wanted.items()
        if letters.count(letter) != count
    ]
    if not problems and letters != "".join(letter * count for letter, count in wanted.items()):
        problems.append("expected the order E, all t, all m, L")
    if len(chunks) != parallel.num_chunks:
        problems.append(
            f"expected pp_size({parallel.pp_size}) * vpp_size({parallel.vpp_size}) = "
            f"{parallel.num_chunks} chunks, got {len(chunks)}"
        )
    if not problems and not ("E" in chunks[0] and "L" in chunks[-1]):
        problems.append("E must be in the first chunk and L in the last")
    empty = [number for number, chunk in enumerate(chunks, start=1) if not chunk]
    if empty:
        problems.append(f"chunk {empty[0]} is empty; write - for one that is meant to be")
    with_mtp = [index for index, chunk in enumerate(chunks) if "m" in chunk]
    if len(with_mtp) > 1:
        problems.append("all MTP layers must be in one chunk")
    elif with_mtp and with_mtp[0] > 0 and with_mtp[0] % parallel.pp_size == 0:
        problems.append("MTP cannot be in a later chunk of the first stage; move it on by one")
    return problems


def _number(chunks: Sequence[str], arch: Architecture, pp_size: int) -> Iterator[Stage]:
    layer = 0
    for index, chunk in enumerate(chunks):
        count = chunk.count("t")
        is_last = layer < arch.num_layers <= layer + count
        yield Stage(
            pp_rank=index % pp_size,
            vpp_rank=index // pp_size,
            has_embedding="E" in chunk,
            layers=tuple(range(layer, layer + count)),
            mtp_layers=tuple(range(chunk.count("m"))),
            has_final_norm=is_last if arch.num_mtp_layers else "L" in chunk,
            has_loss="L" in chunk,
        )
        layer += count
