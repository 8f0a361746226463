"""Numbers in 8 and 4 bits: the layout, and how they are rounded.

A vector of n numbers is cut into blocks. Of a block with the largest magnitude M, each number x is stored as the whole
number x / scale, with scale = M / 127 in 8 bits and M / 7 in 4 bits:

| bits | codes | block | rounding | bytes a number |
|---|---|---|---|---|
| 8 | (n,) int8 | 64 | to the nearest, ties to even | 1.0625 |
| 4 | (⌈n/2⌉,) uint8: code + 8, two a byte, the lower half first | 128 | stochastic | 0.53 |

with scales (blocks,) float32. Zero stays zero. A block whose scale would be no normal float32 becomes zero.

Stochastic rounding of y = x / scale gives ⌊y⌋ + 1 with the probability y − ⌊y⌋, so that what is lost is zero on
average. Its random numbers are a hash of a key and of the position (Chris Wellons's lowbias32, nested), so that every
backend draws the same, and a run that is resumed goes on as it would have.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = {torch.int8: 64, torch.uint8: 128}
"""Numbers of a block, by the dtype of codes."""
LARGEST = {torch.int8: 127, torch.uint8: 7}
"""The largest code, by the dtype of codes."""
SMALLEST_SCALE = torch.finfo(torch.float32).smallest_normal
MASK = 0xFFFFFFFF
MIX = ((16, 0x7FEB352D), (15, 0x846CA68B))
"""Of the hash: shifts, and factors to multiply with after each; a last shift by 16 follows."""


class LowBit(NamedTuple):
    """Numbers in 8 or 4 bits, as described above: which, the dtype of the codes says."""

    codes: Tensor
    scales: Tensor


def allocate_lowbit(numel: int, bits: int, device: torch.device) -> LowBit:
    """Zeros.

    Args:
        numel: n.
        bits: 8 or 4.
    """
    dtype = torch.int8 if bits == 8 else torch.uint8
    codes = torch.zeros(numel, dtype=dtype, device=device)
    if bits == 4:
        codes = torch.full(((numel + 1) // 2,), 0x88, dtype=dtype, device=device)
    return LowBit(codes, torch.zeros(-(-numel // BLOCK[dtype]), dtype=torch.float32, device=device))


def parts(numel: int, block: int, max_elements: int) -> Iterator[tuple[slice, slice]]:
    """Blocks from first to last, in parts of at most max_elements numbers: slices of numbers, and of blocks."""
    step = max(1, max_elements // block)
    for first in range(0, -(-numel // block), step):
        yield slice(first * block, min((first + step) * block, numel)), slice(first, first + step)


def hashed(number: Tensor) -> Tensor:
    """A hash of 32 bits of the lowest 32 bits of integers: int64, from 0 to below 2³²."""
    number = number & MASK
    for shift, factor in MIX:
        number = ((number ^ (number >> shift)) * factor) & MASK
    return number ^ (number >> 16)


def uniform(key: Tensor, first: int, count: int) -> Tensor:
    """Random numbers of 24 bits in [0, 1) for the positions from `first` on: (count,) float32.

    Args:
        key: (1,) int64.
    """
    position = torch.arange(first, first + count, device=key.device)
    return (hashed(position ^ hashed(key ^ hashed(key >> 32))) >> 8).float() * 2.0**-24


def decoded(numbers: LowBit, elements: slice, blocks: slice) -> Tensor:
    """Some blocks as float32."""
    codes, count = numbers.codes, elements.stop - elements.start
    block = BLOCK[codes.dtype]
    if codes.dtype == torch.int8:
        values = codes[elements].float()
    else:
        pairs = codes[elements.start // 2 : (elements.stop + 1) // 2]
        values = (torch.stack([pairs & 15, pairs >> 4], 1).flatten()[:count].float()) - 8
    return values * numbers.scales[blocks].repeat_interleave(block)[:count]


def encoded(values: Tensor, dtype: torch.dtype, first: int = 0, key: Tensor | None = None) -> LowBit:
    """Some blocks of numbers, rounded.

    Args:
        values: float32, all numbers of these blocks.
        dtype: of the codes.
        first: the position of the first number in its vector; even.
        key: (1,) int64, of the random numbers; needed for 4 bits.
    """
    count, block, largest = len(values), BLOCK[dtype], LARGEST[dtype]
    whole = torch.nn.functional.pad(values, (0, -count % block)).view(-1, block)
    scales = whole.abs().amax(1) / largest
    scales = torch.where(scales >= SMALLEST_SCALE, scales, 0.0)
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    scaled = (whole * inverse[:, None]).flatten()[:count]
    if dtype == torch.int8:
        return LowBit(scaled.round().clamp(-largest, largest).to(torch.int8), scales)
    assert key is not None
    down = scaled.floor()
    up = uniform(key, first, count) < scaled - down
    code = (down + up).clamp(-largest, largest).to(torch.int16) + 8
    pairs = torch.nn.functional.pad(code, (0, count % 2), value=8).view(-1, 2)
    return LowBit((pairs[:, 0] | pairs[:, 1] << 4).to(torch.uint8), scales)


def replace_(numbers: LowBit, new: LowBit, elements: slice, blocks: slice, finite: Tensor) -> None:
    """Stores some blocks; where `finite`, () bool, is false all stays as it is, bit for bit."""
    codes = numbers.codes[elements]
    if numbers.codes.dtype == torch.uint8:
        codes = numbers.codes[elements.start // 2 : (elements.stop + 1) // 2]
    for own, others in ((codes, new.codes), (numbers.scales[blocks], new.scales)):
        own.copy_(torch.where(finite, others, own))
