"""Conversion of numbers of any dtype to and from float32, and reading and writing blocks of them.

Conversions work on bits, so that no setting of the processor flushes denormals to zero. Numba makes all integers 64
bits wide. Cutting off carries beyond bit 32 (`& LOW`) shows LLVM that vector lanes of 32 bits are enough.
"""

import numpy as np

from efcp.kernels.cpu.bits import bits_of_float, float_of_bits
from efcp.kernels.cpu.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from efcp.kernels.cpu.machine_code import jit
from efcp.kernels.cpu.memory import (
    load_f32,
    load_f64,
    load_u8,
    load_u16,
    store_f32,
    store_f64,
    store_u8,
    store_u16,
)

LOW = 0xFFFFFFFF


@jit
def bfloat16_to_float32(number: int) -> float:
    return float_of_bits(np.int64(number) << 16)


@jit
def float16_to_float32(number: int) -> float:
    number = np.int64(number)
    magnitude = (number & 0x7FFF) << 13
    rebased = magnitude + ((127 - 15) << 23)
    denormal = bits_of_float(float_of_bits(rebased + (1 << 23)) - np.float32(2.0**-14))
    infinite = rebased + ((128 - 16) << 23)
    bits = denormal if magnitude < 1 << 23 else infinite if magnitude >= 31 << 23 else rebased
    return float_of_bits(bits | (number & 0x8000) << 16)


@jit
def _float32_to_bfloat16(number: float) -> int:
    bits = bits_of_float(number)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & LOW) >> 16
    return rounded if number == number else 0x7FC0


@jit
def _float32_to_float16(number: float) -> int:
    bits = bits_of_float(number)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + ((magnitude >> 13) & 1) + 0xFFF - ((127 - 15) << 23)) & LOW) >> 13
    denormal = bits_of_float(float_of_bits(magnitude) + np.float32(0.5)) - (126 << 23)
    infinite = 0x7E00 if magnitude > 255 << 23 else 0x7C00
    half = denormal if magnitude < 113 << 23 else infinite if magnitude >= (127 + 16) << 23 else normal
    return half | (bits >> 16) & 0x8000


@jit
def number_at(code: int, address: int, index: int) -> float:
    """The number at an index behind an address, as float64. The conversion is exact."""
    if code == FLOAT32:
        return np.float64(load_f32(address, index))
    if code == FLOAT64:
        return load_f64(address, index)
    if code == BFLOAT16:
        return np.float64(bfloat16_to_float32(load_u16(address, index)))
    return np.float64(float16_to_float32(load_u16(address, index)))


@jit
def value_at(code: int, values: int, entry: int) -> float:
    """One value of the window, as float32. The conversion is exact."""
    if code == BFLOAT16:
        return bfloat16_to_float32(load_u16(values, entry))
    if code == FLOAT16:
        return float16_to_float32(load_u16(values, entry))
    return load_f32(values, entry)


@jit
def store_value(code: int, values: int, entry: int, number: float) -> float:
    """Rounds a float32 to the window's dtype, stores it, and returns the stored value as float32."""
    if code == BFLOAT16:
        store_u16(values, entry, _float32_to_bfloat16(number))
    elif code == FLOAT16:
        store_u16(values, entry, _float32_to_float16(number))
    else:
        store_f32(values, entry, number)
    return value_at(code, values, entry)


@jit
def index_at(size: int, indices: int, entry: int) -> int:
    return load_u8(indices, entry) if size == 1 else load_u16(indices, entry)


@jit
def store_index(size: int, indices: int, entry: int, index: int) -> None:
    if size == 1:
        store_u8(indices, entry, index)
    else:
        store_u16(indices, entry, index)


@jit
def read_block(code: int, address: int, first: int, length: int, out: np.ndarray) -> None:
    if code == FLOAT32:
        for j in range(length):
            out[j] = load_f32(address, first + j)
    elif code == BFLOAT16:
        for j in range(length):
            out[j] = bfloat16_to_float32(load_u16(address, first + j))
    elif code == FLOAT16:
        for j in range(length):
            out[j] = float16_to_float32(load_u16(address, first + j))
    else:
        for j in range(length):
            out[j] = load_f64(address, first + j)


@jit
def add_block(code: int, address: int, first: int, length: int, out: np.ndarray) -> None:
    if code == FLOAT32:
        for j in range(length):
            out[j] += load_f32(address, first + j)
    elif code == BFLOAT16:
        for j in range(length):
            out[j] += bfloat16_to_float32(load_u16(address, first + j))
    elif code == FLOAT16:
        for j in range(length):
            out[j] += float16_to_float32(load_u16(address, first + j))
    else:
        for j in range(length):
            out[j] += out.dtype.type(load_f64(address, first + j))


@jit
def write_block(code: int, address: int, first: int, length: int, numbers: np.ndarray) -> None:
    if code == FLOAT32:
        for j in range(length):
            store_f32(address, first + j, np.float32(numbers[j]))
    elif code == BFLOAT16:
        for j in range(length):
            store_u16(address, first + j, _float32_to_bfloat16(np.float32(numbers[j])))
    elif code == FLOAT16:
        for j in range(length):
            store_u16(address, first + j, _float32_to_float16(np.float32(numbers[j])))
    else:
        for j in range(length):
            store_f64(address, first + j, np.float64(numbers[j]))


@jit
def blend_block(
    code: int, address: int, first: int, length: int, old_factor: float, new: np.ndarray, new_factor: float, clear: bool
) -> None:
    """numbers ← old_factor · numbers + new_factor · new. Then new ← 0 where `clear`, else the same before rounding.

    The numbers are `length` of dtype `code` behind `address`, from index `first` on.
    """
    zero = new.dtype.type(0)
    if code == FLOAT32:
        for j in range(length):
            number = old_factor * load_f32(address, first + j) + new_factor * new[j]
            store_f32(address, first + j, np.float32(number))
            new[j] = zero if clear else number
    elif code == BFLOAT16:
        for j in range(length):
            number = old_factor * bfloat16_to_float32(load_u16(address, first + j)) + new_factor * new[j]
            store_u16(address, first + j, _float32_to_bfloat16(np.float32(number)))
            new[j] = zero if clear else number
    elif code == FLOAT16:
        for j in range(length):
            number = old_factor * float16_to_float32(load_u16(address, first + j)) + new_factor * new[j]
            store_u16(address, first + j, _float32_to_float16(np.float32(number)))
            new[j] = zero if clear else number
    else:
        for j in range(length):
            number = old_factor * new.dtype.type(load_f64(address, first + j)) + new_factor * new[j]
            store_f64(address, first + j, np.float64(number))
            new[j] = zero if clear else number
