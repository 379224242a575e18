"""A range of a flat tensor as boxes of the tensor, by numpy's own slices."""

import math

import numpy as np
import pytest

from megatron_dsv3.checkpoint.optimizer import boxes


@pytest.mark.parametrize(
    "shape", [(7,), (3, 4), (2, 3, 4), (1, 1, 5), (4, 1), (2, 2, 2, 2)], ids=str
)
def test_boxes_hold_a_range_in_order_and_nothing_else(shape):
    size = math.prod(shape)
    numbers = np.arange(size).reshape(shape)
    for low in range(size + 1):
        for high in range(low, size + 1):
            found = list(boxes(shape, low, high))
            held = [
                numbers[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
                for offsets, sizes in found
            ]
            assert [int(n) for box in held for n in box.flat] == list(range(low, high))
            assert len(found) <= 2 * (len(shape) - 1) + 1


def test_whole_rows_are_one_box():
    assert list(boxes((5, 8), 8, 32)) == [((1, 0), (3, 8))]
    assert list(boxes((1, 5, 8), 3, 26)) == [
        ((0, 0, 3), (1, 1, 5)),
        ((0, 1, 0), (1, 2, 8)),
        ((0, 3, 0), (1, 1, 2)),
    ]
