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
    room, halves = _room(weight, torch.float32), _room(weight, torch.int16)
    scales = scale_inv * _BIAS
    overflows = bool((scales.isinf() & scale_inv.isfinite()).any())
    for tile in _tiles(weight.shape, offset):
        values = tile.fit(room)
        _decode(bits[tile.part], halves, out=values[tile.window])
        _restore_nan(bits[tile.part], values[tile.window])
        if overflows:
            values.mul_(_BIAS)
        factors = scale_inv if overflows else scales
        _by_blocks(values).mul_(_per_block(factors[tile.blocks]))
        out[tile.part] = values[tile.window]
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
    # What a block at the edge lacks is 0 in all of them.
    room, quotients, magnitudes, halves = [
        _room(weight, dtype) for dtype in (torch.float32, torch.float32, integer, torch.int16)
    ]
    squares = norm = 0.0
    for tile in _tiles(weight.shape):
        # Without their signs, floating-point numbers are in the order of their bits, Inf and NaN
        # last; the largest of bf16's 16 bits is found in a quarter of fp32's time.
        magnitude = tile.fit(magnitudes)
        torch.bitwise_and(bits[tile.part], without_sign, out=magnitude[tile.window])
        largest[tile.blocks] = _block_maximum(magnitude).view(weight.dtype)
        scale_inv[tile.blocks] = _scales(largest[tile.blocks])
        scales = _per_block(scale_inv[tile.blocks])
        values, scaled = tile.fit(room), tile.fit(quotients)
        values[tile.window] = weight[tile.part]
        torch.div(_by_blocks(values), scales, out=_by_blocks(scaled))
        out[tile.part] = scaled[tile.window]
        if measure:
            norm += _sum_of_squares(values)
            _decode(out.view(torch.int8)[tile.part], halves, out=scaled[tile.window])
            _by_blocks(values).addcmul_(_by_blocks(scaled), scales, value=-_BIAS)
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
    rows, cols = differs.shape
    return _block_maximum(F.pad(differs, (0, -cols % BLOCK, 0, -rows % BLOCK))) == 0


def _refuse_endless(largest: Tensor, name: str) -> None:
    """Raises ValueError where a block's largest magnitude is Inf or NaN."""
    if largest.isfinite().all():
        return
    row, col = [BLOCK * i for i in (~largest.isfinite()).nonzero()[0].tolist()]
    raise ValueError(
        f"{name}: the block at [{row}:{row + BLOCK}, {col}:{col + BLOCK}] holds NaN or Inf, "
        f"which FP8 cannot scale; export to bf16 to see the values"
    )


def _decode(bits: Tensor, halves: Tensor, *, out: Tensor) -> None:
    """e4m3 bytes -> the same numbers divided by `_BIAS`; NaNs become finite numbers.

    torch casts e4m3 byte by byte, at 1.5 to 9 ns each on a CPU; all of this takes 0.1 to 0.5 ns.

    Args:
        bits: int8, a tile.
        halves: int16, room for it.
        out: float32, of the tile's shape.
    """
    # The byte's exponent and mantissa land on the low end of fp16's exponent and the high end of
    # its mantissa; the mask clears what sign extension left between them and the sign. By way of
    # fp16, as its subnormals are converted at full speed: in fp32, a few of them take most of the
    # time.
    moved = halves[: bits.numel()].view(bits.shape).copy_(bits)
    out.copy_(moved.mul_(1 << 7).bitwise_and_(_SIGN_EXPONENT_MANTISSA).view(torch.float16))


def _restore_nan(bits: Tensor, values: Tensor) -> None:
    """Sets `values` to NaN where the bytes are e4m3's two NaNs, 0x7F and 0xFF."""
    # They are the largest byte there is: one read as signed, one as unsigned.
    if bits.amax() == 0x7F or bits.view(torch.uint8).amax() == 0xFF:
        values.masked_fill_(bits.bitwise_and(0x7F) == 0x7F, torch.nan)


def _block_maximum(values: Tensor) -> Tensor:
    """Integers >= 0 in whole blocks -> the largest of each block."""
    # In two steps: both dims at once take more than twice as long.
    rows, cols = values.shape
    columns = values.view(rows // BLOCK, BLOCK, cols).amax(1)
    return columns.view(rows // BLOCK, cols // BLOCK, BLOCK).amax(2)


def _scales(largest: Tensor) -> Tensor:
    return (largest / E4M3_MAX).clamp(min=_SMALLEST_NORMAL).masked_fill(largest == 0, 1.0)


def _by_blocks(values: Tensor) -> Tensor:
    """[rows, cols] -> [blocks, 128, blocks, 128]."""
    rows, cols = values.shape
    return values.view(rows // BLOCK, BLOCK, cols // BLOCK, BLOCK)


def _per_block(scales: Tensor) -> Tensor:
    """[blocks, blocks], to be broadcast with what `_by_blocks` gives."""
    return scales[:, None, :, None]


@dataclass(frozen=True, slots=True)
class _Tile:
    """Some whole blocks, cut off where the matrix ends."""

    part: tuple[slice, slice]
    """Rows and columns of the matrix."""
    blocks: tuple[slice, slice]
    window: tuple[slice, slice]
    """Where `part` lies in the whole blocks."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the whole blocks, in elements."""
        rows, cols = [BLOCK * (span.stop - span.start) for span in self.blocks]
        return rows, cols

    def fit(self, room: Tensor) -> Tensor:
        """The whole blocks at the start of `room`; 0 outside of the window."""
        fitted = room[: math.prod(self.shape)].view(self.shape)
        is_full = fitted[self.window].numel() == fitted.numel()
        return fitted if is_full else fitted.zero_()


def _tiles(shape: tuple[int, ...], offset: tuple[int, int] = (0, 0)) -> Iterator[_Tile]:
    """Rectangles of at most `_TILE_BLOCKS` that cover a matrix."""
    high, wide = scale_shape(shape, offset)
    step = min(wide, _TILE_BLOCKS)
    for rows in _spans(high, _TILE_BLOCKS // step):
        for cols in _spans(wide, step):
            blocks = rows, cols
            part, window = zip(*map(_cut, blocks, shape, offset), strict=True)
            yield _Tile(part, blocks, window)


def _spans(count: int, step: int) -> Iterator[slice]:
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _cut(blocks: slice, size: int, offset: int) -> tuple[slice, slice]:
    """Of one dim: what of the matrix lies in `blocks`, and where in them it does."""
    first = BLOCK * blocks.start - offset
    start, stop = max(first, 0), min(BLOCK * blocks.stop - offset, size)
    return slice(start, stop), slice(start - first, stop - first)


def _output(weight: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if out.dtype != dtype or out.shape != weight.shape:
        raise ValueError(f"out: expected {dtype} {list(weight.shape)}, got {_describe(out)}")
    return out


def _room(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for any tile of whole blocks."""
    blocks = min(_TILE_BLOCKS, math.prod(scale_shape(matrix.shape, (BLOCK - 1, BLOCK - 1))))
    return torch.empty(blocks * BLOCK * BLOCK, dtype=dtype, device=matrix.device)


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
