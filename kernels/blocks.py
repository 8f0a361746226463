"""The layout of a sparse window: how a parameter is cut into blocks, and how the rows of the window are stored.

A parameter of n elements is cut into blocks of B elements. Where B does not divide n, the last block is shorter, and is
called the tail. In each row of the window, a block of L elements keeps k = ceil(density · L) of them. The window is
stored block by block, with all m rows of a block side by side:

    indices  (blocks, m, k)  position within the block, ascending in each row; uint8 where B ≤ 256, else int16
    values   (blocks, m, k)

The tail may keep fewer elements than k. The rest of its rows is padding, which no operation reads or writes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

MAX_BLOCK_SIZE = 32768  # positions within a block are stored as int16


class Part(NamedTuple):
    """Some consecutive blocks of the same length."""

    blocks: slice
    elements: slice
    length: int  # L, elements in each block
    kept: int  # k, elements that each block keeps


@lru_cache(maxsize=4096)
def kept(length: int, density: float) -> int:
    """k = ceil(density · length), computed exactly, with density as the decimal number that it prints as.

    In binary floating point 0.07 · 100 is a little more than 7, so its ceiling would be 8.
    """
    return math.ceil(Fraction(str(density)) * length)


@dataclass(frozen=True)
class Blocks:
    """The blocks of a parameter.

    Args:
        numel: n ≥ 0, elements of the parameter.
        block_size: B, elements of a block, 1 ≤ B ≤ 32768. A parameter with fewer elements is one block.
        density: the share of a block's elements that a row of the window keeps, 0 < density ≤ 1.
    """

    numel: int
    block_size: int
    density: float

    @cached_property
    def size(self) -> int:
        """Elements of every block but the tail: B, or n where the parameter is smaller."""
        return max(1, min(self.block_size, self.numel))

    @cached_property
    def full(self) -> int:
        """Number of blocks of `size` elements."""
        return self.numel // self.size

    @cached_property
    def tail(self) -> int:
        """Elements of the tail, the shorter last block; 0 where there is none."""
        return self.numel % self.size

    @cached_property
    def count(self) -> int:
        """Number of all blocks, the tail included."""
        return self.full + (self.tail > 0)

    @cached_property
    def kept(self) -> int:
        """k, the elements that a full block keeps in each row of the window."""
        return kept(self.size, self.density)

    @cached_property
    def kept_in_tail(self) -> int:
        """The elements that the tail keeps in each row of the window; 0 where there is no tail."""
        return kept(self.tail, self.density)

    @property
    def index_dtype(self) -> torch.dtype:
        return torch.uint8 if self.block_size <= 256 else torch.int16

    def parts(self, max_elements: int) -> Iterator[Part]:
        """All blocks in order, in parts of at most `max_elements` elements, but of at least one block."""
        step = max(1, max_elements // self.size)
        for first in range(0, self.full, step):
            last = min(first + step, self.full)
            yield Part(slice(first, last), slice(first * self.size, last * self.size), self.size, self.kept)
        if self.tail:
            yield Part(
                slice(self.full, self.count),
                slice(self.full * self.size, self.numel),
                self.tail,
                self.kept_in_tail,
            )


class SparseRows(NamedTuple):
    """The sparse window of one parameter: values and indices, (blocks, m, k) each, in the layout of `blocks`."""

    values: Tensor
    indices: Tensor
    blocks: Blocks
