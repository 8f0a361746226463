"""The layout of a parameter in blocks."""

import math
from decimal import Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efcp.kernels import MAX_BLOCK_SIZE, Blocks
from efcp.kernels.blocks import kept

SIZES = st.sampled_from([1, 7, 256, 257, 4096, MAX_BLOCK_SIZE]) | st.integers(1, MAX_BLOCK_SIZE)
DENSITIES = st.sampled_from([0.001, 0.01, 0.1, 0.37, 1.0]) | st.floats(1e-6, 1.0)


@pytest.mark.parametrize(
    ("density", "length", "expected"),
    [
        (0.07, 100, 7),  # 0.07 · 100 = 7.000000000000001 in binary floating point
        (0.29, 100, 29),  # 28.999999999999996
        (0.01, 4096, 41),
        (0.001, 1, 1),
        (1e-05, 100000, 1),
        (0.37, 257, 96),
        (1.0, 32768, 32768),
        (1, 63, 63),
        (0.01, 0, 0),
    ],
)
def test_kept(density, length, expected):
    assert kept(length, density) == expected


@given(st.integers(0, MAX_BLOCK_SIZE), DENSITIES)
def test_kept_is_the_ceiling_in_decimal_arithmetic(length, density):
    assert kept(length, density) == math.ceil(Decimal(repr(density)) * length)


@given(st.integers(0, 200_000), SIZES, DENSITIES)
def test_blocks_cover_every_element_once(numel, block_size, density):
    blocks = Blocks(numel, block_size, density)
    lengths = [blocks.size] * blocks.full + [blocks.tail] * (blocks.tail > 0)
    assert len(lengths) == blocks.count
    assert sum(lengths) == numel
    assert all(0 < length <= block_size for length in lengths)
    assert 0 <= blocks.tail < blocks.size
    assert 1 <= blocks.kept_in_tail <= blocks.kept or blocks.tail == 0
    assert 1 <= blocks.kept <= blocks.size


@given(st.integers(0, 2000), st.integers(1, 300), st.integers(1, 2500))
def test_parts_are_the_blocks_in_order(numel, block_size, max_elements):
    blocks = Blocks(numel, block_size, 0.1)
    block = element = 0
    for part in blocks.parts(max_elements):
        count = part.blocks.stop - part.blocks.start
        assert (part.blocks.start, part.elements.start) == (block, element)
        assert part.elements.stop - part.elements.start == count * part.length
        assert count == 1 or count * part.length <= max_elements
        assert part.kept == kept(part.length, 0.1)
        block, element = part.blocks.stop, part.elements.stop
    assert (block, element) == (blocks.count, numel)


@pytest.mark.parametrize(
    ("numel", "block_size", "size", "full", "tail"),
    [
        (0, 4096, 1, 0, 0),
        (1, 4096, 1, 1, 0),
        (63, 4096, 63, 1, 0),  # smaller than a block: one block of its own length
        (4096, 4096, 4096, 1, 0),
        (4097, 4096, 4096, 1, 1),
        (100003, 32768, 32768, 3, 1699),
        (5, 1, 1, 5, 0),
    ],
)
def test_sizes(numel, block_size, size, full, tail):
    blocks = Blocks(numel, block_size, 0.01)
    assert (blocks.size, blocks.full, blocks.tail) == (size, full, tail)
    assert blocks.kept == kept(size, 0.01)
    assert blocks.kept_in_tail == kept(tail, 0.01)


@pytest.mark.parametrize(
    ("numel", "block_size", "dtype"),
    [(1000, 256, torch.uint8), (1000, 257, torch.int16), (256, 4096, torch.int16), (100003, 32768, torch.int16)],
)
def test_index_dtype_holds_every_position(numel, block_size, dtype):
    blocks = Blocks(numel, block_size, 0.01)
    assert blocks.index_dtype == dtype
    assert torch.iinfo(dtype).max >= blocks.size - 1


def test_blocks_are_values():
    assert Blocks(100, 16, 0.1) == Blocks(100, 16, 0.1)
    assert hash(Blocks(100, 16, 0.1)) == hash(Blocks(100, 16, 0.1))
    assert Blocks(100, 16, 0.1) != Blocks(100, 16, 0.2)
