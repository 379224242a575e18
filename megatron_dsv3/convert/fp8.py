"""DeepSeek's FP8 format: e4m3 weights with one fp32 scale for each 128x128 block.

A weight is `fp8 * scale_inv`, multiplied in fp32 and rounded once to the wanted type; the scales
are stored beside it under its name + `_scale_inv`. Both directions walk a matrix in tiles that stay
in the processor's cache: operation after operation on the whole of it takes several times as long.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
SCALE_SUFFIX = "_scale_inv"
E4M3_MAX = 448.0

_TILE_BLOCKS = 64
"""A tile is 4 MiB of fp32; with 1 MiB the cost of calling torch takes a quarter of the time."""
_SIGN_EXPONENT_MANTISSA = 0xBF80 - (1 << 16)
"""Where `_decode` leaves an e4m3 byte's bits in an int16."""
_BIAS = 2.0**8
"""The exponent's bias is 15 in fp16 and 7 in e4m3: by this the decoded numbers are too small."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes: what holds a floating-point number's bits."""
_SMALLEST_NORMAL = torch.finfo(torch.float32).smallest_normal


def scale_shape(shape: tuple[int, ...], offset: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """Blocks that a matrix touches whose first element is at `offset` inside its first block."""
    rows, cols = [-(-(start + size) // BLOCK) for start, size in zip(offset, shape, strict=True)]
    return rows, cols


def dequantize(
    weight: Tensor,
    scale_inv: Tensor,
    *,
    offset: tuple[int, int] = (0, 0),
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """The numbers that an FP8 matrix stands for.

    Args:
        weight: [rows, cols], float8_e4m3fn; a whole matrix or any rectangle of one.
        scale_inv: float32, a scale for each block that `weight` touches.
        offset: Row and column of `weight`'s first element inside its first block.
        dtype: Type of the result.
        out: Where to write, instead of a new tensor: page faults in a large one can cost more time
            than all the arithmetic.
    """
    _check_pair(weight, scale_inv, offset)
    out = _output(weight, dtype, out)
    bits = weight.view(torch.int8)
    room = _decoding_room(weight)
    scales = scale_inv * _BIAS
    overflows = bool((scales.isinf() & scale_inv.isfinite()).any())
    for rows, cols in _tiles(weight, offset):
        values = _decode(bits[rows, cols], *room)
        if overflows:
            values.mul_(_BIAS)
        for block_row, part in _block_rows(rows, offset[0]):
            factors = scale_inv[block_row] if overflows else scales[block_row]
            values[part].mul_(_per_column(factors, cols, offset[1]))
        out[rows, cols] = values
    return out


def quantize(
    weight: Tensor, *, name: str = "weight", out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A matrix in FP8 and the scales of its blocks, each the block's largest magnitude / 448.

    A block of zeros gets scale 1. A scale below fp32's smallest normal number becomes that number:
    a subnormal one would be so inexact that values pass 448, which e4m3 turns into NaN.

    Args:
        weight: [rows, cols], any floating-point type.
        name: What to call it in errors.
        out: Where to write the FP8 numbers, instead of a new tensor.

    Returns:
        float8_e4m3fn [rows, cols] and float32 [ceil(rows / 128), ceil(cols / 128)].
    """
    result = _quantize(weight, name=name, out=out, measure=False)
    return result.weight, result.scale_inv


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix in FP8, and what that cost."""

    weight: Tensor
    scale_inv: Tensor
    squares: float
    """Sum of the squared differences between numbers times scales, in fp32, and the matrix."""
    norm: float
    """Sum of that matrix's squares."""
    num_kept: int = 0
    """Blocks that have the bytes of an original."""


def quantize_measured(
    weight: Tensor, *, name: str = "weight", out: Tensor | None = None
) -> Quantized:
    """As `quantize`, with the error, summed while the numbers are in the processor's cache."""
    return _quantize(weight, name=name, out=out, measure=True)


def _quantize(weight: Tensor, *, name: str, out: Tensor | None, measure: bool) -> Quantized:
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise ValueError(f"{name}: expected a floating-point matrix, got {_describe(weight)}")
    weight = weight.detach()
    out = _output(weight, torch.float8_e4m3fn, out)
    largest = torch.empty(scale_shape(weight.shape), device=weight.device)
    scale_inv = torch.empty_like(largest)
    integer = _INTEGERS[weight.dtype.itemsize]
    bits, without_sign = weight.view(integer), torch.iinfo(integer).max
    scratch, magnitudes = _scratch(weight, torch.float32), _scratch(weight, integer)
    room = _decoding_room(weight) if measure else None
    squares = norm = 0.0
    for rows, cols in _tiles(weight, (0, 0)):
        values = _fit(scratch, weight[rows, cols]).copy_(weight[rows, cols])
        norm += _sum_of_squares(values) if measure else 0.0
        # Without their signs, floating-point numbers are in the order of their bits, Inf and NaN
        # last; the largest of bf16's 16 bits is found in a quarter of fp32's time.
        magnitude = torch.bitwise_and(bits[rows, cols], without_sign, out=_fit(magnitudes, values))
        blocks = slice(cols.start // BLOCK, -(-cols.stop // BLOCK))
        for block_row, part in _block_rows(rows, 0):
            largest[block_row, blocks] = _block_maximum(magnitude[part]).view(weight.dtype)
            scale_inv[block_row, blocks] = _scales(largest[block_row, blocks])
            values[part].div_(_per_column(scale_inv[block_row], cols, 0))
        out[rows, cols] = values
        if room is not None:
            values.sub_(_decode(out.view(torch.int8)[rows, cols], *room), alpha=_BIAS)
            for block_row, part in _block_rows(rows, 0):
                values[part].mul_(_per_column(scale_inv[block_row], cols, 0))
            squares += _sum_of_squares(values)
    _refuse_endless(largest, name)
    return Quantized(out, scale_inv, squares, norm)


def requantize(
    weight: Tensor,
    original: tuple[Tensor, Tensor],
    *,
    name: str = "weight",
    out: Tensor | None = None,
) -> Quantized:
    """Quantises, but a block that is exactly what the original stands for keeps its bytes.

    DeepSeek's scales are not what `quantize` would choose for the numbers that they give: without
    the original, weights that no training touched would come back changed.

    Args:
        weight: [rows, cols], bf16 or wider.
        original: FP8 numbers and scales of the same shape; NaN among them is refused, too.
        name: What to call it in errors.
        out: Where to write FP8 numbers that are not the original's, instead of a new tensor.
    """
    fp8, scale_inv = original
    before = dequantize(fp8, scale_inv).to(weight.dtype)
    integer = _INTEGERS[weight.dtype.itemsize]
    bits, bits_before = weight.view(integer), before.view(integer)
    if torch.equal(bits, bits_before):
        norm = _sum_of_squares(weight.float())
        if math.isfinite(norm):
            return Quantized(fp8, scale_inv, 0.0, norm, scale_inv.numel())
    result = quantize_measured(weight, name=name, out=out)
    kept = _equal_blocks(bits, bits_before)
    if not kept.any():
        return result
    out = result.weight
    for row, col in kept.nonzero().tolist():
        rows, cols = [slice(BLOCK * i, BLOCK * i + BLOCK) for i in (row, col)]
        out[rows, cols] = fp8[rows, cols]
    scales = torch.where(kept, scale_inv, result.scale_inv)
    back = dequantize(out, scales, dtype=torch.float32)
    # A kept block is exact once it is rounded as its reader will round it.
    error = back.sub_(weight).mul_(_whole(~kept, weight.shape))
    return Quantized(out, scales, _sum_of_squares(error), result.norm, int(kept.sum()))


def _whole(blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Gives every element the value of its block."""
    rows, cols = shape
    return blocks.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :cols]


def _sum_of_squares(values: Tensor) -> float:
    flat = values.flatten()
    return float(flat.dot(flat))


def _equal_blocks(a: Tensor, b: Tensor) -> Tensor:
    """Whether two matrices are equal, block by block."""
    differs = (a != b).view(torch.uint8)
    rows = [_block_maximum(differs[part]) for _, part in _block_rows(slice(0, differs.shape[0]), 0)]
    return torch.stack(rows) == 0


def _refuse_endless(largest: Tensor, name: str) -> None:
    """Raises ValueError where a block's largest magnitude is Inf or NaN."""
    if largest.isfinite().all():
        return
    row, col = [BLOCK * i for i in (~largest.isfinite()).nonzero()[0].tolist()]
    raise ValueError(
        f"{name}: the block at [{row}:{row + BLOCK}, {col}:{col + BLOCK}] holds NaN or Inf, "
        f"which FP8 cannot scale; export to bf16 to see the values"
    )


def _decode(bits: Tensor, halves: Tensor, scratch: Tensor) -> Tensor:
    """e4m3 bytes, read as int8 -> the same numbers divided by `_BIAS`, in fp32, in `scratch`.

    torch casts e4m3 byte by byte, at 9 ns each on a CPU; all of this takes 0.5 ns.

    Args:
        bits: int8, a tile.
        halves: int16, room for the tile.
        scratch: float32, room for the tile.
    """
    # The byte's exponent and mantissa land on the low end of fp16's exponent and the high end of
    # its mantissa; the mask clears what sign extension left between them and the sign. By way of
    # fp16, as its subnormals are converted at full speed: in fp32, a few of them take most of the
    # time.
    moved = _fit(halves, bits).copy_(bits).mul_(1 << 7).bitwise_and_(_SIGN_EXPONENT_MANTISSA)
    values = _fit(scratch, bits).copy_(moved.view(torch.float16))
    # The NaNs, 0x7F and 0xFF, are the largest byte there is: one read as signed, one as unsigned.
    if bits.amax() == 0x7F or bits.view(torch.uint8).amax() == 0xFF:
        values.masked_fill_(bits.bitwise_and(0x7F) == 0x7F, torch.nan)
    return values


def _block_maximum(tile: Tensor) -> Tensor:
    """Numbers >= 0, [<= 128 rows, cols] -> the largest of each 128 columns."""
    columns = tile.amax(0)
    return F.pad(columns, (0, -columns.numel() % BLOCK)).view(-1, BLOCK).amax(1)


def _scales(largest: Tensor) -> Tensor:
    return (largest / E4M3_MAX).clamp(min=_SMALLEST_NORMAL).masked_fill(largest == 0, 1.0)


def _per_column(scales: Tensor, cols: slice, offset: int) -> Tensor:
    """The scale of each column in `cols`; `scales` are those of one row of blocks."""
    first, last = cols.start + offset, cols.stop + offset
    blocks = scales[first // BLOCK : -(-last // BLOCK)]
    return blocks.repeat_interleave(BLOCK)[first % BLOCK :][: last - first]


def _tiles(matrix: Tensor, offset: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Rectangles of whole blocks, at most `_TILE_BLOCKS` each, that cover the matrix."""
    wide = min(scale_shape(matrix.shape, offset)[1], _TILE_BLOCKS)
    for rows in _spans(slice(0, matrix.shape[0]), BLOCK * (_TILE_BLOCKS // wide), offset[0]):
        for cols in _spans(slice(0, matrix.shape[1]), BLOCK * wide, offset[1]):
            yield rows, cols


def _block_rows(rows: slice, offset: int) -> Iterator[tuple[int, slice]]:
    """Each row of blocks in the tile `rows`: its index in the matrix, and its part of the tile."""
    for part in _spans(rows, BLOCK, offset):
        block_row = (part.start + offset) // BLOCK
        yield block_row, slice(part.start - rows.start, part.stop - rows.start)


def _spans(span: slice, step: int, offset: int) -> Iterator[slice]:
    """Cuts `span` wherever position + `offset` is a multiple of `step`."""
    cuts = range(-(-(span.start + offset + 1) // step) * step - offset, span.stop, step)
    yield from map(slice, [span.start, *cuts], [*cuts, span.stop])


def _output(weight: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if out.dtype != dtype or out.shape != weight.shape:
        raise ValueError(f"out: expected {dtype} {list(weight.shape)}, got {_describe(out)}")
    return out


def _scratch(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for any tile, one-dimensional so that a smaller tile in it is contiguous, too."""
    numel = min(_TILE_BLOCKS * BLOCK * BLOCK, matrix.numel())
    return torch.empty(numel, dtype=dtype, device=matrix.device)


def _decoding_room(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """What `_decode` needs for any tile."""
    return _scratch(matrix, torch.int16), _scratch(matrix, torch.float32)


def _fit(scratch: Tensor, tile: Tensor) -> Tensor:
    """The start of `scratch` in the shape of `tile`."""
    return scratch[: tile.numel()].view(tile.shape)


def _check_pair(weight: Tensor, scale_inv: Tensor, offset: tuple[int, int]) -> None:
    if weight.dim() != 2 or weight.dtype != torch.float8_e4m3fn or not weight.numel():
        raise ValueError(f"weight: expected a float8_e4m3fn matrix, got {_describe(weight)}")
    if not all(0 <= start < BLOCK for start in offset):
        raise ValueError(f"offset: expected numbers below {BLOCK}, got {offset}")
    expected = scale_shape(weight.shape, offset)
    if scale_inv.dtype != torch.float32 or tuple(scale_inv.shape) != expected:
        raise ValueError(
            f"scale_inv: expected torch.float32 {list(expected)} for a weight of "
            f"{list(weight.shape)} at {offset}, got {_describe(scale_inv)}"
        )


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
