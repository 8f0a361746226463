"""Launches of many parameters at once: two tensors tell a kernel where each parameter is, and whose each block is.

    parameters  (parameters, 8)  int64: addresses of x, y, values and indices (0 for None), number of blocks, a packed
                                 number: k; elements and k of the last block; whether all addresses are aligned; and
                                 the addresses of scales and of a key (0 for none)
    owners      (blocks,)        int64, packed: the parameter, whether this is its last block, the block's number in it

Both are on the device. The blocks of all parameters are numbered consecutively, and a program finds its block with two
loads. Numbers are packed because every load costs time.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from efcp.kernels.addresses import Errors, Momenta, error_addresses, group_addresses, momentum_addresses
from efcp.kernels.blocks import SparseRows
from efcp.kernels.lowbit import LowBit
from efcp.kernels.reference import accumulation_dtype

COLUMNS = tl.constexpr(8)
SCALE_BITS = tl.constexpr(6)  # a scale of numbers in 8 bits is that of 2 to this power of them
SCALE_MASK = tl.constexpr((1 << 6) - 1)
BLOCK_BITS = tl.constexpr(40)  # bits of an owner that hold the number of the block
BLOCK_MASK = tl.constexpr((1 << 40) - 1)
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
    """The two tensors of a launch, on its device (see above)."""

    parameters: Tensor
    owners: Tensor

    @property
    def blocks(self) -> int:
        return len(self.owners)


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
    device = rows[0].values.device
    values, indices, *columns = group_addresses(rows, device, **others)
    none = [0] * len(rows)
    if errors:
        y, scales, key = error_addresses(errors, keys, rows, device)
    else:
        (y, scales), key = momentum_addresses(momenta, device, [r.blocks.numel for r in rows]), none
    x = columns[0] if columns else none
    return tables(device, tuple(zip(x, y, values, indices, (r.blocks for r in rows), scales, key, strict=True)))


@lru_cache(maxsize=256)
def tables(device: torch.device, entries: tuple[tuple[Any, ...], ...]) -> Launch:
    """The tables for parameters with these addresses and layouts. Cached, as most stay the same from step to step.

    Args:
        entries: of each parameter the addresses of x, y, values and indices, and its blocks; where it has them, also
            the addresses of scales and of a key.
    """
    parameters, owners = [], []
    for number, (*addresses, blocks, scales, key) in enumerate((*entry, 0, 0)[:7] for entry in entries):
        aligned = all(address % 16 == 0 for address in (*addresses, scales))  # keys are read one by one
        last = (blocks.tail, blocks.kept_in_tail) if blocks.tail else (blocks.size, blocks.kept)
        packed = blocks.kept | last[0] << FIELD.value | last[1] << 2 * FIELD.value | aligned << 3 * FIELD.value
        parameters.append([*addresses, blocks.count, packed, scales, key])
        owner = torch.arange(blocks.count, device="cpu") | number << (BLOCK_BITS.value + 1)
        owner[-1:] |= 1 << BLOCK_BITS.value
        owners.append(owner)
    return Launch(_on(device, torch.tensor(parameters, device="cpu")), _on(device, torch.cat(owners)))


_captured: list[Tensor] = []  # kept alive, since a CUDA graph copies from them again at each replay


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # so that the host does not wait for the copy
        if torch.cuda.is_current_stream_capturing():
            _captured.append(tensor)
    return tensor.to(device, non_blocking=True)


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
def find_block(parameters, owners, program, SIZE: tl.constexpr):
    """Finds a program's block: (row, block, length, kept, stride, aligned).

    row is the address of its parameter's row in the table, block its number in the parameter, length its elements, kept
    the entries that it keeps in each row of the window, stride the entries from one row to the next, and aligned
    whether all tensors of the parameter begin at multiples of 128 bits.
    """
    owner = tl.load(owners + program)
    row = parameters + (owner >> (BLOCK_BITS + 1)) * COLUMNS
    block = owner & BLOCK_MASK  # int64
    packed = tl.load(row + 5)
    last = ((owner >> BLOCK_BITS) & 1) != 0
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
