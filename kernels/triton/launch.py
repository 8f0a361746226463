"""Launches of many parameters at once: a table on the device tells a kernel where each parameter is.

    rows    (parameters, 8)  int64: addresses of x, y, values and indices (0 for None), number of blocks, a packed
                             number: k; elements and k of the last block; whether all addresses are aligned; and the
                             addresses of scales and of a key (0 for none)
    firsts  (parameters,)    int64: the number of each parameter's first block

one behind the other. The blocks of all parameters are numbered consecutively, and a program finds the parameter of its
block by a binary search. Numbers are packed because every load costs time.
"""

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from efcp.kernels.addresses import Errors, Momenta, error_addresses, group_addresses, momentum_addresses
from efcp.kernels.blocks import Blocks, SparseRows
from efcp.kernels.lowbit import LowBit
from efcp.kernels.reference import accumulation_dtype
from efcp.kernels.tables import on_device, once

COLUMNS = tl.constexpr(8)
SCALE_BITS = tl.constexpr(6)  # a scale of numbers in 8 bits is that of 2 to this power of them
SCALE_MASK = tl.constexpr((1 << 6) - 1)
FIELD = tl.constexpr(16)  # bits of a packed length or k, which are at most 32768
FIELD_MASK = tl.constexpr((1 << 16) - 1)

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
    torch.int8: tl.int8,
    torch.int16: tl.int16,
}


class Launch(NamedTuple):
    """The table of a launch, on its device (see above), and how many parameters and blocks are in it."""

    table: Tensor
    parameters: int
    blocks: int


def launch_of(
    rows: Sequence[SparseRows],
    momenta: Momenta = (),
    errors: Errors = (),
    keys: Sequence[Tensor] = (),
    **others: Sequence[Tensor | None],
) -> Launch:
    """Checks a group of parameters, and makes the tables of its launch.

    Args:
        rows: the window of each parameter.
        momenta: of each parameter, y in the table; or empty.
        errors: of each parameter, y in the table in place of momenta; or empty.
        keys: of each parameter where errors are in 4 bits.
        others: by argument name: gradients or targets, x in the table; or none.
    """

    def make() -> Launch:
        device = rows[0].values.device
        values, indices, *columns = group_addresses(rows, device, **others)
        none = [0] * len(rows)
        if errors:
            y, scales, key = error_addresses(errors, keys, rows, device)
        else:
            (y, scales), key = momentum_addresses(momenta, device, [r.blocks.numel for r in rows]), none
        x = columns[0] if columns else none
        return launch_at(device, [r.blocks for r in rows], x, y, values, indices, scales, key)

    return once("launch", [rows, momenta, errors, keys, *others.values()], make)


def launch_at(
    device: torch.device,
    layouts: Sequence[Blocks],
    x: Sequence[int],
    y: Sequence[int] | None = None,
    values: Sequence[int] | None = None,
    indices: Sequence[int] | None = None,
    scales: Sequence[int] | None = None,
    keys: Sequence[int] | None = None,
) -> Launch:
    """The launch of parameters with these blocks and addresses, one each; None for what they have not."""
    none = [0] * len(layouts)
    addresses = [none if column is None else column for column in (x, y, values, indices, scales, keys)]
    table = on_device(device, (layouts, addresses), lambda: _table(layouts, *addresses))
    return Launch(table, len(layouts), sum(blocks.count for blocks in layouts))


def _table(
    layouts: Sequence[Blocks],
    x: Sequence[int],
    y: Sequence[int],
    values: Sequence[int],
    indices: Sequence[int],
    scales: Sequence[int],
    keys: Sequence[int],
) -> Tensor:
    packed = []
    for blocks, *addresses in zip(layouts, x, y, values, indices, scales, strict=True):  # keys are read one by one
        aligned = all(address % 16 == 0 for address in addresses)
        length, kept = (blocks.tail, blocks.kept_in_tail) if blocks.tail else (blocks.size, blocks.kept)
        number = blocks.kept | length << FIELD.value | kept << 2 * FIELD.value | aligned << 3 * FIELD.value
        packed.append(number)
    counts = [blocks.count for blocks in layouts]
    rows = zip(x, y, values, indices, counts, packed, scales, keys, strict=True)
    firsts = list(accumulate(counts, initial=0))[:-1]
    return torch.tensor([*chain.from_iterable(rows), *firsts], device="cpu")


def triton_accumulation_dtype(dtype: torch.dtype) -> tl.dtype:
    """`accumulation_dtype` as a dtype of Triton."""
    return DTYPES[accumulation_dtype(dtype)]


def stored_dtype(numbers: Momenta) -> torch.dtype | None:
    """The dtype that momenta or errors have in memory; None without any."""
    if not numbers:
        return None
    first = numbers[0]
    return first.codes.dtype if isinstance(first, LowBit) else first.dtype


@triton.jit
def find_block(table, parameters, program, SIZE: tl.constexpr):
    """Finds a program's block: (row, block, length, kept, stride, aligned).

    row is the address of its parameter's row in the table, block its number in the parameter, length its elements, kept
    the entries that it keeps in each row of the window, stride the entries from one row to the next, and aligned
    whether all tensors of the parameter begin at multiples of 128 bits.
    """
    firsts = table + parameters * COLUMNS
    first = tl.load(firsts)
    low, high = 0, parameters
    while high - low > 1:
        middle = (low + high) // 2
        candidate = tl.load(firsts + middle)
        before = candidate <= program
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
        first = tl.where(before, candidate, first)
    row = table + low * COLUMNS
    block = program - first  # int64
    packed = tl.load(row + 5)
    last = block + 1 == tl.load(row + 4)
    stride = packed & FIELD_MASK  # int64
    length = tl.where(last, (packed >> FIELD) & FIELD_MASK, SIZE).to(tl.int32)
    kept = tl.where(last, (packed >> (FIELD * 2)) & FIELD_MASK, stride).to(tl.int32)
    return row, block, length, kept, stride, (packed >> (FIELD * 3)) != 0


@triton.jit
def find_scales(row, block, SIZE: tl.constexpr):
    """Of a block's momentum in 8 bits: address of its first scale, and how many numbers of that come before it."""
    first = block * SIZE
    scales = tl.load(row + 6).to(tl.pointer_type(tl.float32)) + (first >> SCALE_BITS)
    return scales, (first & SCALE_MASK).to(tl.int32)
