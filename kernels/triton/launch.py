"""Groups of parameters in one launch: a table of what a kernel has to know of each, and who owns which block.

A kernel gets two tensors on the device, whatever the number of parameters:

    parameters  (parameters, 8)  int64: addresses of x, y, values and indices, 0 for None; number of blocks; packed,
                                 as every load counts: k, elements and k of the last block, whether all is aligned;
                                 addresses of scales and of a key, 0 for none
    owners      (blocks,)        int64, packed: row of `parameters`, whether the last of its blocks, its number there

The blocks of all parameters stand one after the other, so that a program finds its block with two loads.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from efcp.kernels.addresses import Momenta, group_addresses, momentum_addresses
from efcp.kernels.blocks import SparseRows
from efcp.kernels.lowbit import LowBit
from efcp.kernels.reference import accumulation_dtype

COLUMNS = tl.constexpr(8)
SCALE_BITS = tl.constexpr(6)  # a scale of numbers in 8 bits is that of 2 to this power of them
SCALE_MASK = tl.constexpr((1 << 6) - 1)
BLOCK_BITS = tl.constexpr(40)  # of an owner, for the number of a block
BLOCK_MASK = tl.constexpr((1 << 40) - 1)
FIELD = tl.constexpr(16)  # bits of a length, at most 32768, or of a k
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
    """What a launch is told of its parameters, on its device."""

    parameters: Tensor
    owners: Tensor

    @property
    def blocks(self) -> int:
        return len(self.owners)


def launch_of(rows: Sequence[SparseRows], momenta: Momenta = (), **others: Sequence[Tensor | None]) -> Launch:
    """The launch for parameters with these windows and up to two other tensors each, x and y in the table.

    Args:
        rows: values, indices and layouts.
        momenta: of each parameter, y in the table; or empty.
        others: by name, for errors: of each parameter a gradient or target, then an error; empty for none.
    """
    device = rows[0].values.device
    values, indices, *columns = group_addresses(rows, device, **others)
    own, scales = momentum_addresses(momenta, device, [r.blocks.numel for r in rows])
    x, y = [*columns, *[[0] * len(rows), own][len(columns) :]]
    return tables(device, tuple(zip(x, y, values, indices, (r.blocks for r in rows), scales, strict=True)))


@lru_cache(maxsize=256)
def tables(device: torch.device, entries: tuple[tuple[Any, ...], ...]) -> Launch:
    """The launch for parameters with these addresses and layouts; made once, as most stay from step to step.

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


_captured: list[Tensor] = []  # a graph of CUDA copies from these again at each replay, so they stay


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # so that the copy waits for nothing
        if torch.cuda.is_current_stream_capturing():
            _captured.append(tensor)
    return tensor.to(device, non_blocking=True)


def triton_accumulation_dtype(dtype: torch.dtype) -> tl.dtype:
    """`accumulation_dtype` in Triton's terms."""
    return DTYPES[accumulation_dtype(dtype)]


def momentum_dtype(momenta: Momenta) -> torch.dtype | None:
    """The dtype that momenta have in memory; None without any."""
    if not momenta:
        return None
    first = momenta[0]
    return first.codes.dtype if isinstance(first, LowBit) else first.dtype


def warp_size() -> int:
    """Threads of a warp of the current GPU."""
    return 32 if triton.knobs.runtime.interpret else int(triton.runtime.driver.active.get_current_target().warp_size)


def at_most_registers(number: int) -> dict[str, int]:
    """The option of a launch that lets a thread have so many registers, where there is one."""
    if triton.knobs.runtime.interpret or triton.runtime.driver.active.get_current_target().backend != "cuda":
        return {}
    return {"maxnreg": number}


@triton.jit
def find_block(parameters, owners, program, SIZE: tl.constexpr):
    """What a program has to know of its block: (row, block, length, kept, stride, aligned).

    The row of the table that its parameter has; the block's number there, and its elements; entries that it keeps in a
    row of the window, and from one row to the next; whether tensors begin where an access of 128 bits may.
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
