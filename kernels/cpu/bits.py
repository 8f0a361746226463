"""The bits of numbers and of masks, in plain Numba."""

import numpy as np

from efcp.kernels.cpu.machine_code import jit


@jit
def float_of_bits(bits: int) -> float:
    """The float32 that the lowest 32 bits of an integer stand for."""
    return np.uint32(bits).view(np.float32)


@jit
def bits_of_float(number: float) -> int:
    """The 32 bits of a float32, as an int64 that is not negative."""
    return np.int64(np.float32(number).view(np.uint32))


@jit
def bits_set(mask: int) -> int:
    """How many bits of a uint64 are set, as int64. LLVM makes a single instruction of the loop."""
    count = np.int64(0)
    while mask != np.uint64(0):
        mask &= mask - np.uint64(1)
        count += 1
    return count


@jit
def trailing_zeros(mask: int) -> int:
    """The position of the lowest bit set in a uint64, as uint64; 64 where none is set. LLVM makes one instruction."""
    return np.uint64(bits_set(~mask & (mask - np.uint64(1))))
