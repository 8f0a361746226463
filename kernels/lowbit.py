"""Numbers in 8 and 4 bits: the layout, and how they are rounded.

A vector of n numbers is cut into blocks. Of a block with the largest magnitude M, each number x is stored as the whole
number x / scale, with scale = M / 127 in 8 bits and M / 7 in 4 bits:

| bits | codes | block | rounding | bytes a number |
|---|---|---|---|---|
| 8 | (n,) int8 | 64 | to the nearest, ties to even | 1.0625 |
| 4 | (⌈n/2⌉,) uint8: code + 8, two a byte, the lower half first | 128 | stochastic | 0.53 |

with scales (blocks,) float32. Zero stays zero. A block whose scale would be no normal float32 becomes zero.

The error of a sparse window is cut into the blocks of the window first (`efcp.kernels.blocks`), and each of these is
stored as a vector by itself, one after the other. So no scale and no byte belongs to two blocks of the window, whatever
their size. Where that is a multiple of 64 in 8 bits, or 128 in 4, the layout is that of one vector.

Stochastic rounding of y = x / scale gives ⌊y⌋ + 1 with the probability y − ⌊y⌋, so that what is lost is zero on
average. Its random numbers are a hash of a key and of the position in the whole vector (Chris Wellons's lowbias32,
nested), so that every backend draws the same, and a run that is resumed goes on as it would have.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from efcp.kernels.blocks import Blocks

BLOCK = {torch.int8: 64, torch.uint8: 128}
"""Numbers of a block, by the dtype of codes."""
LARGEST = {torch.int8: 127, torch.uint8: 7}
"""The largest code, by the dtype of codes."""
SMALLEST_SCALE = torch.finfo(torch.float32).smallest_normal
MASK = 0xFFFFFFFF
MIX = ((16, 0x7FEB352D), (15, 0x846CA68B))
"""The hash's shifts, and the factors to multiply with after each; a last shift by 16 follows."""


class LowBit(NamedTuple):
    """Numbers in 8 or 4 bits, as described above: which, the dtype of the codes says."""

    codes: Tensor
    scales: Tensor


def lengths(numel: int, dtype: torch.dtype) -> tuple[int, int]:
    """How many codes of a dtype, and how many scales, a vector of `numel` numbers has."""
    return numel if dtype == torch.int8 else (numel + 1) // 2, -(-numel // BLOCK[dtype])


def lengths_in_pieces(numel: int, size: int, dtype: torch.dtype) -> tuple[int, int]:
    """The same of a vector that is cut into pieces of `size` numbers, the last one shorter, each stored by itself."""
    codes, scales = lengths(size, dtype)
    more_codes, more_scales = lengths(numel % size, dtype)
    return numel // size * codes + more_codes, numel // size * scales + more_scales


def allocate_lowbit(numel: int, bits: int, device: torch.device, size: int | None = None) -> LowBit:
    """Zeros.

    Args:
        numel: n.
        bits: 8 or 4.
        size: numbers of the pieces that are stored each by itself; None for one piece.
    """
    dtype = torch.int8 if bits == 8 else torch.uint8
    codes, scales = lengths_in_pieces(numel, size or max(1, numel), dtype)
    zero = 0 if bits == 8 else 0x88
    return LowBit(
        torch.full((codes,), zero, dtype=dtype, device=device),
        torch.zeros(scales, dtype=torch.float32, device=device),
    )


def pieces(numbers: LowBit, size: int, first: int, count: int, length: int) -> LowBit:
    """Some consecutive pieces of the same length: views, codes (count, ·) and scales (count, ·).

    Args:
        size: numbers of each piece but the last of all.
        first: the number of the first piece.
        length: numbers of each of these pieces.
    """
    views = []
    for own, before, here in zip(numbers, *(lengths(n, numbers.codes.dtype) for n in (size, length)), strict=True):
        views.append(own[first * before :][: count * here].view(count, here))
    return LowBit(*views)


def parts(numel: int, block: int, max_elements: int) -> Iterator[slice]:
    """Numbers from first to last, in parts of whole blocks: at most max_elements numbers, or one block."""
    step = max(1, max_elements // block) * block
    return (slice(first, min(first + step, numel)) for first in range(0, numel, step))


def view(numbers: LowBit, elements: slice) -> LowBit:
    """A view of some numbers, which begin where a block does, and end where one does or where all end."""
    block = BLOCK[numbers.codes.dtype]
    in_byte = 1 if numbers.codes.dtype == torch.int8 else 2
    return LowBit(
        numbers.codes[elements.start // in_byte : -(-elements.stop // in_byte)],
        numbers.scales[elements.start // block : -(-elements.stop // block)],
    )


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


def decoded(numbers: LowBit, elements: slice) -> Tensor:
    """Some numbers, as of `view`, as float32."""
    codes, scales = view(numbers, elements)
    return decoded_pieces(LowBit(codes[None], scales[None]), elements.stop - elements.start)[0]


def decoded_blocks(numbers: LowBit, blocks: Blocks) -> Iterator[Tensor]:
    """The error in few bits of a parameter with a sparse window: its blocks as float32, those of a length together."""
    for part in blocks.parts(max(1, blocks.numel)):
        count = part.blocks.stop - part.blocks.start
        yield decoded_pieces(pieces(numbers, blocks.size, part.blocks.start, count, part.length), part.length)


def decoded_pieces(numbers: LowBit, length: int) -> Tensor:
    """Pieces of `length` numbers each, of which `pieces` gives codes and scales: (pieces, length) float32."""
    codes, scales = numbers
    if codes.dtype == torch.int8:
        values = codes.float()
    else:
        values = torch.stack([codes & 15, codes >> 4], 2).flatten(1)[:, :length].float() - 8
    return values * scales.repeat_interleave(BLOCK[codes.dtype], 1)[:, :length]


def encoded(values: Tensor, dtype: torch.dtype, first: int = 0, key: Tensor | None = None) -> LowBit:
    """Some blocks of numbers, rounded.

    Args:
        values: float32, all numbers of these blocks.
        dtype: of the codes.
        first: the position of the first number in its vector; even.
        key: (1,) int64, of the random numbers; needed for 4 bits.
    """
    codes, scales = encoded_pieces(values[None], dtype, first, key)
    return LowBit(codes[0], scales[0])


def encoded_pieces(values: Tensor, dtype: torch.dtype, first: int = 0, key: Tensor | None = None) -> LowBit:
    """Pieces of numbers, rounded: codes and scales as `pieces` gives them.

    Args:
        values: (pieces, length) float32.
        dtype: of the codes.
        first: the position of the first number in its vector.
        key: (1,) int64, of the random numbers; needed for 4 bits.
    """
    (count, length), block, largest = values.shape, BLOCK[dtype], LARGEST[dtype]
    whole = torch.nn.functional.pad(values, (0, -length % block)).view(count, -(-length // block), block)
    scales = whole.abs().amax(2) / largest
    scales = torch.where(scales >= SMALLEST_SCALE, scales, 0.0)
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    scaled = (whole * inverse[..., None]).flatten(1)[:, :length]
    if dtype == torch.int8:
        return LowBit(scaled.round().clamp(-largest, largest).to(torch.int8), scales)
    assert key is not None
    down = scaled.floor()
    up = uniform(key, first, count * length).view(count, length) < scaled - down
    code = (down + up).clamp(-largest, largest).to(torch.int16) + 8
    pairs = torch.nn.functional.pad(code, (0, length % 2), value=8).view(count, (length + 1) // 2, 2)
    return LowBit((pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8), scales)


def replace_(numbers: LowBit, new: LowBit, elements: slice, finite: Tensor) -> None:
    """Stores some numbers, as of `view`; where `finite`, () bool, is false all stays as it is, bit for bit."""
    for own, others in zip(view(numbers, elements), new, strict=True):
        own.copy_(torch.where(finite, others, own))
