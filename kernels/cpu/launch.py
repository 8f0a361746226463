"""Kernels and threads: what a kernel is told of its parameters, and how threads share its work.

A kernel takes the address of a call, eight bytes each: the share that is taken next, the number of shares, the number
of pieces, which the shares are made of, and arguments. It takes shares of the blocks of all parameters, or of other
pieces, until none is left. What it allocates it allocates before: a thread that finds no memory leaves the work to the
others.

The threads are PyTorch's own OpenMP team. After an operation of PyTorch these wait for the next one busily, for
milliseconds: any other thread would have to wait for a core, while they start at once. Where there is no such team, as
in a forked child, threads of Python take its place; the compiled code is the same and runs without the GIL. Numba's
threading layers would not do: of those that are always at hand, one aborts when two threads call it, the other in a
forked child. Small operations run in the caller.
"""

import ctypes
import os
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from efcp.kernels.addresses import Momenta, addresses, floating, group_addresses, momentum_addresses
from efcp.kernels.blocks import SparseRows
from efcp.kernels.cpu.dtypes import CODES, INT8, NONE
from efcp.kernels.cpu.llvm import load_i64, take_number
from efcp.kernels.cpu.machine_code import Kernel, jit
from efcp.kernels.lowbit import LowBit

CPU = torch.device("cpu")
PARALLEL = 1 << 15  # elements, or entries of the window, from which on several threads are worth it; as in PyTorch
PIECES = 64  # at most so many partial sums, whatever the number of threads


@jit
def take_share(call: int) -> tuple[int, int]:
    """The pieces of a share, from `first` to before `last`; the same twice when no share is left."""
    share, shares, pieces = take_number(call), load_i64(call, 1), load_i64(call, 2)
    if share >= shares:
        return pieces, pieces
    return pieces * share // shares, pieces * (share + 1) // shares


@jit
def table_row(table: int, parameters: int, number: int) -> tuple[int, int, int, int, int, int, int, int, int, int]:
    """A row of the table, which is stored column by column: the number of the first block behind this parameter, n, B,
    k, k of the tail, and addresses: of values, of indices, of the two tensors of n elements of an operation, and of the
    scales of the second where it is in 8 bits."""
    return (
        load_i64(table, number),
        load_i64(table, number + parameters),
        load_i64(table, number + parameters * 2),
        load_i64(table, number + parameters * 3),
        load_i64(table, number + parameters * 4),
        load_i64(table, number + parameters * 5),
        load_i64(table, number + parameters * 6),
        load_i64(table, number + parameters * 7),
        load_i64(table, number + parameters * 8),
        load_i64(table, number + parameters * 9),
    )


def _openmp() -> Callable[[int, int, int, int], None] | None:
    """What the `parallel` of C calls: function, its argument, threads, flags. None where PyTorch does not have it."""
    try:
        parallel = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (AttributeError, OSError):
        return None
    parallel.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    parallel.restype = None
    return parallel


_team = _openmp()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="efcp")


def _forget_threads() -> None:
    global _team
    _team = None
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)  # no thread survives a fork, and OpenMP would wait for its own


def run(kernel: Kernel, arguments: tuple[int, ...], pieces: int, work: int) -> None:
    """Calls a kernel in as many threads as PyTorch is set to, or, where there is little work, in this one."""
    threads = torch.get_num_threads() if work >= PARALLEL and pieces > 1 else 1
    # Shares are small enough that a thread which another process holds up keeps nobody waiting.
    shares = min(pieces, 8 * threads if threads > 1 else 1)
    call = array("q", [0, shares, pieces, *arguments])

    def take_shares() -> None:
        kernel.ctypes(call.buffer_info()[0])

    if threads > 1 and _team is not None:  # all of the team: OpenMP would end the others, and start them again later
        _team(kernel.address, call.buffer_info()[0], threads, 0)
    else:
        helpers = [_pool().submit(take_shares) for _ in range(min(threads, pieces) - 1)]
        take_shares()
        for helper in helpers:
            if not helper.cancel():
                helper.result()
    if call[0] < shares:
        raise MemoryError("no thread could allocate its scratch")


class Launch(NamedTuple):
    """What the kernels are told about a launch of parameters, and totals over these."""

    table: "array[int]"
    parameters: int
    largest: int  # elements of a block
    blocks: int
    elements: int
    entries: int  # of a row of the window

    @property
    def arguments(self) -> tuple[int, int, int]:
        return self.table.buffer_info()[0], self.parameters, self.largest


def launch_of(rows: Sequence[SparseRows], momenta: Momenta = (), **others: Sequence[Tensor | None]) -> Launch:
    """With the table of `table_row`: the first tensors of an operation, by name, then the second ones, or momenta."""
    layouts = [r.blocks for r in rows]
    ends = list(accumulate(blocks.count for blocks in layouts))
    numels = [blocks.numel for blocks in layouts]
    sizes = [blocks.size for blocks in layouts]
    table = [*ends, *numels, *sizes, *(blocks.kept for blocks in layouts), *(blocks.kept_in_tail for blocks in layouts)]
    for column in group_addresses(rows, CPU, **others):
        table += column
    if len(others) < 2:
        table += [0] * len(rows) * (1 - len(others))
        for column in momentum_addresses(momenta, CPU, numels):
            table += column
    else:
        table += [0] * len(rows)
    entries = sum(blocks.count * blocks.kept for blocks in layouts)
    return Launch(array("q", table), len(rows), max(sizes), ends[-1], sum(numels), entries)


def momentum_code(momenta: Momenta) -> int:
    """The dtype of momenta, as kernels know it."""
    if not momenta:
        return NONE
    return INT8 if isinstance(momenta[0], LowBit) else CODES[momenta[0].dtype]


def scalar_address(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    """The address of a tensor of one element, of any floating point dtype where none is given."""
    return addresses(name, [tensor], dtype or floating(name, tensor), CPU, [1])[0]


def slot_address(slot: Tensor, window_size: int) -> int:
    """The address of the number of a row, which is in the window."""
    address = scalar_address("slot", slot, torch.int64)
    row = ctypes.c_int64.from_address(address).value
    if not 0 <= row < window_size:
        raise IndexError(f"slot must be from 0 to {window_size - 1}, got {row}")
    return address
