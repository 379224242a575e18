"""FP8 blocks against a naive reference, torch's own float8 casts and brute force over all bytes."""

import math

import pytest
import torch
from torch import Tensor

from megatron_dsv3.convert.fp8 import dequantize, quantize, requantize, scale_shape

# Whole blocks, less than one, ragged edges; wider and taller than one tile of 64 blocks.
SHAPES = [(128, 128), (1, 1), (3, 200), (130, 257), (256, 576), (129, 8400), (8400, 100), (300, 70)]


def random_fp8(rows: int, cols: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Any bytes but the two NaNs, and scales of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    octets = torch.randint(0, 256, (rows, cols), dtype=torch.uint8, generator=generator)
    octets[octets & 0x7F == 0x7F] = 0x7E
    scales = torch.randn(scale_shape((rows, cols)), generator=generator) * 1e-3
    scales.view(-1)[::3] *= 1e4
    return octets.view(torch.float8_e4m3fn), scales


def naive(weight: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """DeepSeek's rule element by element: one scale each, one product, one rounding."""
    scales = scale_inv.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (weight.float() * scales[: weight.shape[0], : weight.shape[1]]).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantising_is_deepseeks_rule_bit_for_bit(shape):
    weight, scale_inv = random_fp8(*shape)
    assert same_bits(dequantize(weight, scale_inv), naive(weight, scale_inv))


@pytest.mark.parametrize("scale", [1.0, 2.5, -3e-4, 1e-42, 3e36, math.inf, 0.0])
def test_every_byte_decodes_as_torch_does_at_any_scale(scale):
    octets = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    weight, scale_inv = octets.view(torch.float8_e4m3fn), torch.tensor([[scale]])
    got, expected = dequantize(weight, scale_inv), naive(weight, scale_inv)
    numbers = ~expected.isnan()
    assert torch.equal(got.isnan(), expected.isnan())
    assert same_bits(got[numbers], expected[numbers])
    assert got.isnan().sum() >= 2, "0x7F and 0xFF are NaN"


def test_either_nan_is_found_without_the_other():
    for octet in (0x7F, 0xFF):
        octets = torch.full((2, 3), 0x80, dtype=torch.uint8)
        octets[1, 2] = octet
        nan = dequantize(octets.view(torch.float8_e4m3fn), torch.ones(1, 1)).isnan()
        assert nan.nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("rows", "cols"),
    [
        (slice(128, 256), slice(None)),  # on the blocks
        (slice(100, 300), slice(0, 300)),  # starts and ends inside of blocks
        (slice(144, 288), slice(None)),  # what the second of four ranks has of 576 rows
        (slice(5, 20), slice(270, 290)),  # inside one block
        (slice(299, 576), slice(127, 129)),
        (slice(None), slice(77, None)),
    ],
)
def test_a_rectangle_anywhere_gets_the_scales_of_its_blocks(rows, cols):
    weight, scale_inv = random_fp8(576, 300)
    (top, bottom, _), (left, right, _) = rows.indices(576), cols.indices(300)
    scales = scale_inv[top // 128 : -(-bottom // 128), left // 128 : -(-right // 128)]
    got = dequantize(weight[rows, cols], scales, offset=(top % 128, left % 128))
    assert same_bits(got, naive(weight, scale_inv)[rows, cols].contiguous())


@pytest.mark.parametrize("shape", [(9000, 120), (150, 9000)])
def test_a_rectangle_of_many_tiles_that_starts_inside_a_block(shape):
    weight, scale_inv = random_fp8(*shape)
    got = dequantize(weight[55:, 33:], scale_inv, offset=(55, 33))
    assert same_bits(got, naive(weight, scale_inv)[55:, 33:].contiguous())


def test_a_wider_type_keeps_the_whole_product():
    weight, scale_inv = random_fp8(130, 140)
    expected = naive(weight, scale_inv, torch.float32)
    assert same_bits(dequantize(weight, scale_inv, dtype=torch.float32), expected)
    assert not torch.equal(expected, naive(weight, scale_inv).float())


def test_results_can_go_where_the_caller_wants():
    weight, scale_inv = random_fp8(130, 140)
    out = torch.empty(130, 140, dtype=torch.bfloat16)
    assert dequantize(weight, scale_inv, out=out) is out
    assert same_bits(out, naive(weight, scale_inv))
    fp8 = torch.empty_like(weight)
    assert quantize(torch.nn.Parameter(out), out=fp8)[0] is fp8
    assert same_bits(fp8, quantize(out)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(130, 257)}, "weight: expected a float8_e4m3fn matrix, got .*32"),
        (
            {"scale_inv": torch.zeros(3, 2)},
            r"torch.float32 \[2, 3\] .*, got torch.float32 \[3, 2\]",
        ),
        ({"scale_inv": torch.zeros(2, 3).bfloat16()}, "expected torch.float32 .*, got .*bfloat16"),
        ({"offset": (127, 0)}, r"expected torch.float32 \[3, 3\] .* at \(127, 0\)"),
        ({"offset": (128, 0)}, "offset: expected numbers below 128"),
        ({"out": torch.zeros(130, 257)}, r"out: expected torch.bfloat16 \[130, 257\], got .*32"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    weight, scale_inv = random_fp8(130, 257)
    with pytest.raises(ValueError, match=message):
        dequantize(**({"weight": weight, "scale_inv": scale_inv} | changes))


def nearest_e4m3(values: Tensor) -> Tensor:
    """The closest of all finite e4m3 numbers, ties to the even byte: found by trying every one."""
    octets = torch.arange(256, dtype=torch.uint8)
    octets = octets[octets & 0x7F != 0x7F]
    table = octets.view(torch.float8_e4m3fn).double()
    distance = (values.double().unsqueeze(-1) - table).abs()
    # An odd byte loses a tie; of the two zeros, the one of the value's sign wins.
    odd, other_sign = octets & 1, torch.signbit(table) != torch.signbit(values).unsqueeze(-1)
    return octets[(distance + 1e-12 * odd + 1e-13 * other_sign).argmin(-1)]


def test_quantising_divides_by_the_scale_and_takes_the_nearest_number():
    weight = torch.randn(200, 150, generator=torch.Generator().manual_seed(1)).bfloat16()
    fp8, scale_inv = quantize(weight)
    for row in range(2):
        for col in range(2):
            part = (slice(128 * row, 128 * row + 128), slice(128 * col, 128 * col + 128))
            block = weight[part].float()
            assert scale_inv[row, col] == block.abs().max() / torch.tensor(448.0)
            expected = nearest_e4m3(block / scale_inv[row, col])
            assert torch.equal(fp8[part].view(torch.uint8), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantised_numbers_are_torchs_own_casts(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    fp8, scale_inv = quantize(weight)
    scales = scale_inv.repeat_interleave(128, 0).repeat_interleave(128, 1)
    divided = weight.float() / scales[: shape[0], : shape[1]]
    assert scale_inv.shape == scale_shape(shape)
    assert same_bits(fp8, divided.to(torch.float8_e4m3fn))
    assert not fp8.float().isnan().any()


def test_the_largest_number_of_each_block_comes_back_and_the_others_closely():
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(3)).bfloat16()
    back = dequantize(*quantize(weight))
    blocks = [t.float().view(2, 128, 3, 128).abs().amax((1, 3)) for t in (weight, back)]
    assert torch.equal(*blocks)
    # Half a step of three mantissa bits; below 2^-6 of the scale the steps are equal in size.
    normal = weight.abs() > 0.01 * weight.abs().max()
    assert ((back - weight).abs() <= weight.abs() / 16 + 1e-3)[normal].all()


def test_blocks_of_zeros_and_of_tiny_numbers_are_safe():
    weight = torch.zeros(128, 384)
    weight[5, 200] = 1e-40
    weight[3, 300] = -1e-44
    fp8, scale_inv = quantize(weight)
    assert scale_inv.tolist() == [[1.0, 2.0**-126, 2.0**-126]]
    assert same_bits(dequantize(fp8, scale_inv)[:, :128], torch.zeros(128, 128).bfloat16())
    assert not dequantize(fp8, scale_inv).isnan().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (129, 8300), (130, 5)])
def test_nan_and_inf_are_refused_with_name_and_block(bad, place):
    weight = torch.ones(131, 8400).bfloat16()
    weight[place] = bad
    row, col = (128 * (i // 128) for i in place)
    where = rf"o_proj: the block at \[{row}:{row + 128}, {col}:{col + 128}\] holds NaN or Inf"
    with pytest.raises(ValueError, match=where):
        quantize(weight, name="o_proj")


@pytest.mark.parametrize("weight", [torch.ones(4), torch.ones(4, 4).int(), torch.ones(0, 4)])
def test_what_is_no_matrix_of_numbers_is_not_quantised(weight):
    with pytest.raises(ValueError, match="norm: expected a floating-point matrix"):
        quantize(weight, name="norm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_untouched_numbers_keep_the_bytes_and_scales_that_gave_them(shape, dtype):
    original = random_fp8(*shape)
    values = dequantize(*original).to(dtype)
    result = requantize(values, original)
    assert same_bits(result.weight, original[0])
    assert same_bits(result.scale_inv, original[1])
    assert result.num_kept == original[1].numel()
    assert not same_bits(quantize(values)[1], original[1]), "without the original they differ"


@pytest.mark.parametrize("element", [(0, 0), (129, 256), (200, 130)])
def test_a_changed_block_is_quantised_anew_and_the_others_stay(element):
    original = random_fp8(300, 257)
    values = dequantize(*original)
    values[element] = 3.0
    result = requantize(values, original)
    row, col = (i // 128 for i in element)
    block = (slice(128 * row, 128 * row + 128), slice(128 * col, 128 * col + 128))
    anew, scales = quantize(values)
    expected = original[0].clone(), original[1].clone()
    expected[0][block], expected[1][row, col] = anew[block], scales[row, col]
    assert same_bits(result.weight, expected[0])
    assert same_bits(result.scale_inv, expected[1])
    assert result.num_kept == 8


def test_a_master_between_two_bf16_numbers_is_not_taken_for_untouched():
    original = random_fp8(128, 128)
    values = dequantize(*original).float()
    values[3, 4] = torch.nextafter(values[3, 4], torch.tensor(9.0))
    assert values.bfloat16()[3, 4] == dequantize(*original)[3, 4]
    assert requantize(values, original).num_kept == 0


def test_nan_is_refused_even_where_the_original_has_it():
    octets = torch.full((2, 300), 0x7F, dtype=torch.uint8)
    original = octets.view(torch.float8_e4m3fn), torch.ones(1, 3)
    with pytest.raises(ValueError, match=r"down: the block at \[0:128, 0:128\] holds NaN"):
        requantize(dequantize(*original), original, name="down")
