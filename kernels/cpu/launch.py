"""Launches of kernels on a CPU: the table of parameters that a kernel reads, and the threads that share its work.

The work of a kernel is cut into pieces, such as blocks or ranges of columns, and pieces are grouped into shares. A
kernel has one argument, the address of a call. That is an array of int64:

    number of the next share to take, number of shares, number of pieces, arguments of the kernel ...

Every thread runs the kernel, which takes one share after another until none is left. A kernel allocates its memory
before it takes a share, so a thread that cannot allocate leaves the work to the others.

The threads are PyTorch's own OpenMP team. After an operation of PyTorch, these threads keep their cores busy for
milliseconds, waiting for the next operation. So they start at once, while any other thread would have to wait for a
core. Where there is no such team, as in a forked child, Python threads take its place. They run the same compiled code,
without the GIL. Numba's own threading layers are no alternative: of the two that are always available, one aborts when
two threads call it, the other in a forked child. Small operations run in the calling thread.
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

from efcp.kernels.addresses import (
    Errors,
    Momenta,
    addresses,
    error_addresses,
    floating,
    group_addresses,
    momentum_addresses,
)
from efcp.kernels.blocks import SparseRows
from efcp.kernels.cpu.dtypes import CODES, INT4, INT8, NONE
from efcp.kernels.cpu.llvm import take_number
from efcp.kernels.cpu.machine_code import Kernel, jit
from efcp.kernels.cpu.memory import load_i64
from efcp.kernels.lowbit import LowBit

CPU = torch.device("cpu")
PARALLEL = 1 << 15  # elements, or entries of the window; with fewer, one thread is faster. The same as in PyTorch
PIECES = 64  # the most partial sums; it does not depend on the number of threads, so neither do results


@jit
def take_share(call: int) -> tuple[int, int]:
    """Takes the next share. Returns the range of its pieces, (first, last + 1), which is empty when none is left."""
    share, shares, pieces = take_number(call), load_i64(call, 1), load_i64(call, 2)
    if share >= shares:
        return pieces, pieces
    return pieces * share // shares, pieces * (share + 1) // shares


@jit
def table_row(table: int, parameters: int, number: int) -> tuple[int, int, int, int, int, int, int, int, int, int]:
    """The row of a parameter in the table, which is stored column by column.

    Returns:
        The number of the first block after this parameter, counted over all parameters; n; B; k; k of the tail; and the
        addresses of its values, its indices, the operation's two other tensors of n elements, and the scales of the
        second of these where it is in few bits.
    """
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
    """The function that `#pragma omp parallel` calls in C, or None where PyTorch does not contain it.

    Its arguments are a function, the argument of that, the number of threads, and flags.
    """
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
    os.register_at_fork(after_in_child=_forget_threads)  # threads do not survive a fork; OpenMP would wait for its own


def run(kernel: Kernel, arguments: tuple[int, ...], pieces: int, work: int) -> None:
    """Runs a kernel with as many threads as PyTorch is set to use, or in this thread where there is little work.

    Args:
        arguments: what `pieces_and_arguments` gives the kernel after the number of pieces.
        pieces: how many pieces the work is cut into.
        work: elements, or entries of the window, that the kernel reads.

    Raises:
        MemoryError: if no thread could allocate its memory.
    """
    threads = torch.get_num_threads() if work >= PARALLEL and pieces > 1 else 1
    # Shares are so small that the others hardly wait for a thread that another process holds up.
    shares = min(pieces, 8 * threads if threads > 1 else 1)
    call = array("q", [0, shares, pieces, *arguments])

    def take_shares() -> None:
        kernel.ctypes(call.buffer_info()[0])

    if threads > 1 and _team is not None:  # the whole team: OpenMP would end unused threads and restart them later
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
    """The table of a group of parameters that kernels read, and totals over these parameters."""

    table: "array[int]"
    parameters: int
    largest: int  # elements of the largest block
    blocks: int
    elements: int
    entries: int  # in one row of the window

    @property
    def arguments(self) -> tuple[int, int, int]:
        return self.table.buffer_info()[0], self.parameters, self.largest


def launch_of(
    rows: Sequence[SparseRows],
    momenta: Momenta = (),
    errors: Errors = (),
    keys: Sequence[Tensor] = (),
    **others: Sequence[Tensor | None],
) -> Launch:
    """Checks a group of parameters, and makes the table that `table_row` reads.

    Args:
        rows: the window of each parameter.
        momenta: of each parameter; or empty.
        errors: of each parameter, in place of momenta; or empty.
        keys: of each parameter where errors are in 4 bits: a column of the table behind those that `table_row` reads.
        others: by argument name: one list or none. Addresses are 0 where there is none.
    """
    layouts = [r.blocks for r in rows]
    ends = list(accumulate(blocks.count for blocks in layouts))
    numels = [blocks.numel for blocks in layouts]
    sizes = [blocks.size for blocks in layouts]
    table = [*ends, *numels, *sizes, *(blocks.kept for blocks in layouts), *(blocks.kept_in_tail for blocks in layouts)]
    own = error_addresses(errors, keys, rows, CPU) if errors else momentum_addresses(momenta, CPU, numels)
    for column in (*group_addresses(rows, CPU, **others), *([] if others else [[0] * len(rows)]), *own):
        table += column
    entries = sum(blocks.count * blocks.kept for blocks in layouts)
    return Launch(array("q", table), len(rows), max(sizes), ends[-1], sum(numels), entries)


def error_code_of(errors: Errors) -> int:
    """The dtype of errors, as kernels know it."""
    if not errors:
        return NONE
    first = errors[0]
    return CODES[first.dtype] if isinstance(first, Tensor) else INT8 if first.codes.dtype is torch.int8 else INT4


def momentum_code(momenta: Momenta) -> int:
    """The dtype of momenta, as kernels know it."""
    if not momenta:
        return NONE
    return INT8 if isinstance(momenta[0], LowBit) else CODES[momenta[0].dtype]


def scalar_address(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    """The address of a tensor of one element. Without `dtype`, the tensor may have any floating point dtype."""
    return addresses(name, [tensor], dtype or floating(name, tensor), CPU, [1])[0]


def slot_address(slot: Tensor, window_size: int) -> int:
    """The address of the slot. Raises IndexError unless the slot is a row of the window."""
    address = scalar_address("slot", slot, torch.int64)
    row = ctypes.c_int64.from_address(address).value
    if not 0 <= row < window_size:
        raise IndexError(f"slot must be from 0 to {window_size - 1}, got {row}")
    return address
