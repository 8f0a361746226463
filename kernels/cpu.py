"""The operations on a CPU, compiled by Numba.

The blocks of all parameters are numbered through and shared out among threads; a thread takes one block at a time and
works in a scratch of that block's size, so that memory is read and written once and no temporary grows with a
parameter. The compiled functions see a table of addresses and sizes, and dtype codes, not arrays: a call costs
microseconds, each parameter one more, and one compilation serves many combinations of dtypes.

Results do not depend on the number of threads. `compress_` and `window_apply_` give the bits of the definition;
`window_dots` and `update_inverse_root_` add up the same float64 terms in another fixed order, and `all_finite` adds up
the squares of a chunk in float32, of chunks in float64.

The threads are PyTorch's own OpenMP team. After an operation of PyTorch these wait for the next one busily, for
milliseconds: any other thread would have to wait for a core, while they start at once. Where there is no such team, as
in a forked child, threads of Python take its place; the compiled code is the same and runs without the GIL. Numba's
threading layers would not do: of those that are always at hand, one aborts when two threads call it, the other in a
forked child. Small operations run in the caller.
"""

import ctypes
import math
import os
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import llvmlite.ir as ir
import numpy as np
import torch
from numba import carray, njit, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model
from torch import Tensor

from efcp.kernels.addresses import addresses, check_weights, gradient_addresses, group_addresses
from efcp.kernels.blocks import Rows
from efcp.kernels.machine_code import compiled
from efcp.kernels.reference import accumulation_dtype

__all__ = ["all_finite", "compress_", "update_inverse_root_", "window_apply_", "window_dots"]

CPU = torch.device("cpu")
PARALLEL = 1 << 15  # elements, or entries of the window, from which on several threads are worth it; as in PyTorch
PIECES = 64  # at most so many partial sums, whatever the number of threads
CHUNK = 4096  # elements of a gradient, the unit in which `all_finite` is shared out
FETCHING_ROWS = 16  # of the window; after so many `window_apply_` fetches a portion of the parameter into the cache
PIECE_ROWS = 64  # of an m × m matrix, the unit in which it is shared out
LANES = 64  # elements whose comparisons make one bit mask
FEW = 48  # entries of a row in a block, up to which it is worth finding first which entries of others may meet it
SHORT = 16  # entries of a row in a block, up to which `window_apply_` takes eight at a time across rows
PORTION = 1024  # entries of the window among which these are looked for at a time

FLOAT32, BFLOAT16, FLOAT16, FLOAT64, NONE = range(5)
SIZES = (4, 2, 2, 8, 0)  # bytes, by code
CODES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float64: FLOAT64}


def _jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compiles a part of a kernel."""
    return njit(nogil=True, error_model="numpy", **options)(function)


class Kernel(Protocol):
    """Compiled code that takes the address of a call (see `_run`)."""

    address: int
    ctypes: Callable[[int], None]  # releases the GIL


def _kernel(*constants: object) -> Callable[[Callable[[int], None]], Kernel]:
    """Compiles what Python calls, or loads its machine code from disk.

    The cache sees changes of this file only: what a kernel is made of has to stand here. Constants that a kernel is
    compiled for become part of its name, which is that of a symbol in the machine code: two of one name, from different
    processes, could end up with each other's code. The cache also compares what a kernel refers to in the function
    around it: that must be numbers and types, since any other object is a new one in each process.

    Raises:
        BackendError: if it cannot be compiled.
    """

    def kernel(function: Callable[[int], None]) -> Kernel:
        function.__qualname__ = "-".join(map(str, [function.__name__, *constants]))
        return compiled(function, (types.int64,), types.void, error_model="numpy")

    return kernel


def _instruction(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Makes a function in compiled code of LLVM's instructions; it is called without the typing context."""
    return intrinsic(**options)(function) if options else intrinsic(function)


# Memory behind an address. Unlike an index into an array, no index here is tested for being negative.

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


def _loader(stored: ir.Type, result: types.Type) -> Callable[..., Any]:
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        address, index = arguments
        value = builder.load(builder.gep(builder.inttoptr(address, stored.as_pointer()), [index]))
        return builder.zext(value, I64) if isinstance(stored, ir.IntType) else value

    @_instruction
    def load(typing_context: Any, address: Any, index: Any) -> Any:
        return result(types.int64, types.int64), codegen

    return load


def _storer(stored: ir.Type, accepted: types.Type) -> Callable[..., Any]:
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        address, index, value = arguments
        if isinstance(stored, ir.IntType):
            value = builder.trunc(value, stored)
        builder.store(value, builder.gep(builder.inttoptr(address, stored.as_pointer()), [index]))
        return context.get_dummy_value()

    @_instruction
    def store(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
        return types.void(types.int64, types.int64, accepted), codegen

    return store


_load_u8, _store_u8 = _loader(I8, types.uint64), _storer(I8, types.uint64)
_load_u16, _store_u16 = _loader(I16, types.uint64), _storer(I16, types.uint64)
_load_i64 = _loader(I64, types.int64)
_load_f32, _store_f32 = _loader(ir.FloatType(), types.float32), _storer(ir.FloatType(), types.float32)
_load_f64, _store_f64 = _loader(ir.DoubleType(), types.float64), _storer(ir.DoubleType(), types.float64)


@_instruction
def _float_of_bits(typing_context: Any, bits: Any) -> Any:
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return builder.bitcast(builder.trunc(arguments[0], I32), ir.FloatType())

    return types.float32(types.int64), codegen


@_instruction
def _bits_of_float(typing_context: Any, number: Any) -> Any:
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return builder.zext(builder.bitcast(arguments[0], I32), I64)

    return types.int64(types.float32), codegen


@_instruction
def _prefetch(typing_context: Any, address: Any) -> Any:
    """Fetches 64 bytes into the second-level cache. Any address will do."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        pointer = I8.as_pointer()
        function_type = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], function_type)
        to_read, second_level, data = (ir.Constant(I32, n) for n in (0, 2, 1))
        builder.call(function, [builder.inttoptr(arguments[0], pointer), to_read, second_level, data])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _lanes_at_least(builder: ir.IRBuilder, numbers: ir.Value, key: ir.Value) -> ir.Value:
    """64 bits: which of 64 integers, their signs put aside, are at least `key`."""
    vector, bits = numbers.type, numbers.type.element.width
    keys = builder.and_(numbers, ir.Constant(vector, [2 ** (bits - 1) - 1] * LANES))
    bound = builder.insert_element(ir.Constant(vector, ir.Undefined), key, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
    bound = builder.shuffle_vector(bound, ir.Constant(vector, ir.Undefined), zeros)
    return builder.bitcast(builder.icmp_signed(">=", keys, bound), I64)


@_instruction
def _mask_at_least(typing_context: Any, address: Any, key: Any) -> Any:
    """64 bits: which of the 64 keys at an address, their signs put aside, are at least `key`."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        vector = ir.VectorType(ir.IntType(key.bitwidth), LANES)
        numbers = builder.load(builder.inttoptr(arguments[0], vector.as_pointer()), align=key.bitwidth // 8)
        return _lanes_at_least(builder, numbers, arguments[1])

    return types.uint64(types.int64, key), codegen


@_instruction
def _add_and_mask(typing_context: Any, error: Any, grad: Any, key: Any) -> Any:
    """Adds the 64 numbers at one address to those at another, and returns the mask of `_mask_at_least` for the sums."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        size = key.bitwidth // 8
        vector = ir.VectorType(ir.FloatType() if size == 4 else ir.DoubleType(), LANES)
        pointers = [builder.inttoptr(address, vector.as_pointer()) for address in arguments[:2]]
        total = builder.fadd(*(builder.load(pointer, align=size) for pointer in pointers))
        builder.store(total, pointers[0], align=size)
        bits = builder.bitcast(total, ir.VectorType(ir.IntType(key.bitwidth), LANES))
        return _lanes_at_least(builder, bits, arguments[2])

    return types.uint64(types.int64, types.int64, key), codegen


@_instruction
def _trailing_zeros(typing_context: Any, mask: Any) -> Any:
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), codegen


@_instruction
def _bits_set(typing_context: Any, mask: Any) -> Any:
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), codegen


@_instruction
def _pointer(typing_context: Any, address: Any) -> Any:
    """For `numba.carray`, which makes an array of the memory there."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return builder.inttoptr(arguments[0], I8.as_pointer())

    return types.voidptr(types.int64), codegen


# A call: what threads share that work on the same operation. Eight bytes each: the share that is taken next, the number
# of shares, the number of pieces, which the shares are made of, and the arguments of the kernel.


@partial(_instruction, prefer_literal=True)
def _pieces_and_arguments(typing_context: Any, call: Any, count: Any) -> Any:
    """The number of pieces and so many arguments."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        first = builder.inttoptr(arguments[0], I64.as_pointer())
        numbers = [builder.load(builder.gep(first, [ir.Constant(I64, 2 + n)])) for n in range(count.literal_value + 1)]
        return context.make_tuple(builder, signature.return_type, numbers)

    return types.UniTuple(types.int64, count.literal_value + 1)(types.int64, count), codegen


@_instruction
def _take(typing_context: Any, call: Any) -> Any:
    """The number of a share, which no other thread gets."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        following = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.atomic_rmw("add", following, ir.Constant(I64, 1), "monotonic")

    return types.int64(types.int64), codegen


@_jit
def _take_share(call: int) -> tuple[int, int]:
    """The pieces of a share, from `first` to before `last`; the same twice when no share is left."""
    share, shares, pieces = _take(call), _load_i64(call, 1), _load_i64(call, 2)
    if share >= shares:
        return pieces, pieces
    return pieces * share // shares, pieces * (share + 1) // shares


# Numbers of any dtype, to and from float32 by the bits, so that no setting of the processor flushes a denormal. Numba
# makes all integers 64 bits wide; where a carry beyond 32 is cut off, the compiler sees that lanes of 32 will do.

LOW = 0xFFFFFFFF


@_jit
def _bfloat16_to_float32(number: int) -> float:
    return _float_of_bits(np.int64(number) << 16)


@_jit
def _float16_to_float32(number: int) -> float:
    number = np.int64(number)
    magnitude = (number & 0x7FFF) << 13
    rebased = magnitude + ((127 - 15) << 23)
    denormal = _bits_of_float(_float_of_bits(rebased + (1 << 23)) - np.float32(2.0**-14))
    infinite = rebased + ((128 - 16) << 23)
    bits = denormal if magnitude < 1 << 23 else infinite if magnitude >= 31 << 23 else rebased
    return _float_of_bits(bits | (number & 0x8000) << 16)


@_jit
def _float32_to_bfloat16(number: float) -> int:
    bits = _bits_of_float(number)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & LOW) >> 16
    return rounded if number == number else 0x7FC0


@_jit
def _float32_to_float16(number: float) -> int:
    bits = _bits_of_float(number)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + ((magnitude >> 13) & 1) + 0xFFF - ((127 - 15) << 23)) & LOW) >> 13
    denormal = _bits_of_float(_float_of_bits(magnitude) + np.float32(0.5)) - (126 << 23)
    infinite = 0x7E00 if magnitude > 255 << 23 else 0x7C00
    half = denormal if magnitude < 113 << 23 else infinite if magnitude >= (127 + 16) << 23 else normal
    return half | (bits >> 16) & 0x8000


@_jit
def _number(code: int, address: int, index: int) -> float:
    """One number, as float64; exact."""
    if code == FLOAT32:
        return np.float64(_load_f32(address, index))
    if code == FLOAT64:
        return _load_f64(address, index)
    if code == BFLOAT16:
        return np.float64(_bfloat16_to_float32(_load_u16(address, index)))
    return np.float64(_float16_to_float32(_load_u16(address, index)))


@_jit
def _value(code: int, values: int, entry: int) -> float:
    """One value of the window, as float32."""
    if code == BFLOAT16:
        return _bfloat16_to_float32(_load_u16(values, entry))
    if code == FLOAT16:
        return _float16_to_float32(_load_u16(values, entry))
    return _load_f32(values, entry)


@_jit
def _store_value(code: int, values: int, entry: int, number: float) -> float:
    """Stores a float32 in the window, and returns what is stored."""
    if code == BFLOAT16:
        _store_u16(values, entry, _float32_to_bfloat16(number))
    elif code == FLOAT16:
        _store_u16(values, entry, _float32_to_float16(number))
    else:
        _store_f32(values, entry, number)
    return _value(code, values, entry)


@_jit
def _index(size: int, indices: int, entry: int) -> int:
    return _load_u8(indices, entry) if size == 1 else _load_u16(indices, entry)


@_jit
def _store_index(size: int, indices: int, entry: int, index: int) -> None:
    if size == 1:
        _store_u8(indices, entry, index)
    else:
        _store_u16(indices, entry, index)


@_jit
def _read(code: int, address: int, first: int, length: int, out: np.ndarray) -> None:
    if code == FLOAT32:
        for j in range(length):
            out[j] = _load_f32(address, first + j)
    elif code == BFLOAT16:
        for j in range(length):
            out[j] = _bfloat16_to_float32(_load_u16(address, first + j))
    elif code == FLOAT16:
        for j in range(length):
            out[j] = _float16_to_float32(_load_u16(address, first + j))
    else:
        for j in range(length):
            out[j] = _load_f64(address, first + j)


@_jit
def _add(code: int, address: int, first: int, length: int, out: np.ndarray) -> None:
    if code == FLOAT32:
        for j in range(length):
            out[j] += _load_f32(address, first + j)
    elif code == BFLOAT16:
        for j in range(length):
            out[j] += _bfloat16_to_float32(_load_u16(address, first + j))
    elif code == FLOAT16:
        for j in range(length):
            out[j] += _float16_to_float32(_load_u16(address, first + j))
    else:
        for j in range(length):
            out[j] += out.dtype.type(_load_f64(address, first + j))


@_jit
def _write(code: int, address: int, first: int, length: int, numbers: np.ndarray) -> None:
    if code == FLOAT32:
        for j in range(length):
            _store_f32(address, first + j, np.float32(numbers[j]))
    elif code == BFLOAT16:
        for j in range(length):
            _store_u16(address, first + j, _float32_to_bfloat16(np.float32(numbers[j])))
    elif code == FLOAT16:
        for j in range(length):
            _store_u16(address, first + j, _float32_to_float16(np.float32(numbers[j])))
    else:
        for j in range(length):
            _store_f64(address, first + j, np.float64(numbers[j]))


@_jit
def _blend(
    code: int, address: int, first: int, length: int, old_factor: float, new: np.ndarray, new_factor: float, clear: bool
) -> None:
    """numbers at the address ← old_factor · numbers + new_factor · new; and new ← the same unrounded, or 0"""
    zero = new.dtype.type(0)
    if code == FLOAT32:
        for j in range(length):
            number = old_factor * _load_f32(address, first + j) + new_factor * new[j]
            _store_f32(address, first + j, np.float32(number))
            new[j] = zero if clear else number
    elif code == BFLOAT16:
        for j in range(length):
            number = old_factor * _bfloat16_to_float32(_load_u16(address, first + j)) + new_factor * new[j]
            _store_u16(address, first + j, _float32_to_bfloat16(np.float32(number)))
            new[j] = zero if clear else number
    elif code == FLOAT16:
        for j in range(length):
            number = old_factor * _float16_to_float32(_load_u16(address, first + j)) + new_factor * new[j]
            _store_u16(address, first + j, _float32_to_float16(np.float32(number)))
            new[j] = zero if clear else number
    else:
        for j in range(length):
            number = old_factor * new.dtype.type(_load_f64(address, first + j)) + new_factor * new[j]
            _store_f64(address, first + j, np.float64(number))
            new[j] = zero if clear else number


@partial(_jit, fastmath={"reassoc", "contract"})
def _sum_of_squares(code: int, address: int, first: int, last: int) -> float:
    """In the dtype of arithmetic: where that overflows, so does the sum over all."""
    if code == FLOAT64:
        wide = np.float64(0)
        for j in range(first, last):
            wide += _load_f64(address, j) ** 2
        return wide
    total = np.float32(0)
    if code == FLOAT32:
        for j in range(first, last):
            number = _load_f32(address, j)
            total += number * number
    elif code == BFLOAT16:
        for j in range(first, last):
            number = _bfloat16_to_float32(_load_u16(address, j))
            total += number * number
    else:
        for j in range(first, last):
            number = _float16_to_float32(_load_u16(address, j))
            total += number * number
    return np.float64(total)


Ahead = tuple[int, int, int, int]  # the next block: where its gradient starts, bytes an element, the same of its error


# Selection. The key of a number is its bits without the sign: an integer that orders as the magnitude does.


@_jit
def _count(bits: np.ndarray, length: int, key: int, most: int) -> int:
    """How many keys are at least `key`. In the integer type of the bits throughout, so that all its lanes count."""
    count = np.int32(0)
    for j in range(length):
        count = np.int32(count + np.int32(bits.dtype.type(bits[j] & most) >= key))
    return count


@_jit
def _largest(bits: np.ndarray, length: int, most: int) -> int:
    largest = bits.dtype.type(0)
    for j in range(length):
        largest = max(largest, bits.dtype.type(bits[j] & most))
    return largest


@_jit
def _coarse_threshold(
    bits: np.ndarray, length: int, kept: int, enough: int, guess: int, reaching: int, most: int
) -> tuple[int, int]:
    """A key that at least `kept` and at most `enough` elements reach, or, where ties forbid it, the largest that `kept`
    reach; and how many reach it.

    The search goes from the guess, which so many are known to reach (0: no guess), in growing steps until the key lies
    between two others, then bisects.
    """
    integer = bits.dtype.type
    low, reached = integer(0), np.int64(length)
    if reached <= enough:
        return low, reached
    high = most  # reached by fewer than `kept`
    key, count = guess, np.int64(reaching)
    if guess == 0:
        key = max(integer(1), _largest(bits, length, most))
        count = np.int64(_count(bits, length, key, most))
    step = np.int64(most >> 13)
    while True:
        if count < kept:
            high, following = key, np.int64(key) - step
        else:
            low, reached, following = key, count, np.int64(key) + step
            if count <= enough:
                break
        if high - low <= 1:
            break
        if not low < following < high:
            following = low + ((np.int64(high) - low) >> 1)
        key, step = integer(following), step << 1
        count = np.int64(_count(bits, length, key, most))
    return low, reached


@_jit
def _fine_threshold(keys: np.ndarray, length: int, kept: int, low: int, most: int) -> int:
    """The largest key that `kept` of the keys reach, or a smaller one that no more reach; all of them reach `low`.

    Steps that go where `kept` would be if keys were spread evenly take turns with bisection.
    """
    integer = keys.dtype.type
    reached, above = np.int64(length), np.int64(0)
    high = np.int64(_largest(keys, length, most)) + 1
    even = False
    while reached != kept and high - low > 1:
        span, even = high - low, not even
        part = np.int64(np.float64(span) * (np.float64(reached - kept) / np.float64(reached - above)))
        key = integer(low + (min(max(part, 1), span - 1) if even else span >> 1))
        count = np.int64(_count(keys, length, key, most))
        if count >= kept:
            low, reached = key, count
        else:
            high, above = np.int64(key), count
    return low


@_jit
def _collect(bits: np.ndarray, length: int, key: int, most: int, ties: int, limit: int, found: np.ndarray) -> None:
    """Positions, ascending, of the `limit` elements that exceed a key, or are among the first `ties` that equal it."""
    count = np.uint64(0)
    for position in range(length):
        own = bits.dtype.type(bits[position] & most)
        if own >= key:
            if own == key:
                if ties == 0:
                    continue
                ties -= 1
            found[count] = position
            count += np.uint64(1)
            if count == np.uint64(limit):
                return


@_jit
def _masks(bits: np.ndarray, length: int, key: int, masks: np.ndarray) -> int:
    """Which elements reach a key, 64 to a mask; and how many."""
    reached = np.int64(0)
    for start in range(0, length, LANES):
        mask = _mask_at_least(bits.ctypes.data + start * bits.itemsize, key)
        if start + LANES > length:
            mask &= (np.uint64(1) << np.uint64(length - start)) - np.uint64(1)
        masks[start // LANES] = mask
        reached += _bits_set(mask)
    return reached


@_jit
def _positions(masks: np.ndarray, length: int, found: np.ndarray, ahead: Ahead) -> None:
    """Positions, ascending, of the bits that are set in masks. There must be room for four more.

    Four are written at a time, whether there are as many or not: the processor cannot predict how many bits are set.
    On the way it fetches what is needed next, in small portions, so that neither memory nor the processor waits.
    """
    grad, grad_size, error, error_size = ahead
    count = np.uint64(0)
    for start in range(0, length, LANES):
        for line in range(start * grad_size, (start + LANES) * grad_size, 64):
            _prefetch(grad + line)
        for line in range(start * error_size, (start + LANES) * error_size, 64):
            _prefetch(error + line)
        mask = masks[start // LANES]
        for at in range(count, count + np.uint64(_bits_set(mask)), np.uint64(4)):
            for more in range(4):
                found[np.uint64(at) + np.uint64(more)] = np.uint64(start) + _trailing_zeros(mask)
                mask &= mask - np.uint64(1)
        count += np.uint64(_bits_set(masks[start // LANES]))


@_jit
def _select(
    bits: np.ndarray, length: int, kept: int, guess: int, reached: int, most: int, masks: np.ndarray,
    found: np.ndarray, keys: np.ndarray, ahead: Ahead,
) -> int:  # fmt: skip
    """Positions, ascending, of the `kept` largest keys, of equal ones the first, into `found`.

    Few passes over the block find a key that somewhat more elements reach, and the choice among those is made apart.
    The guess is right for most blocks, and the first pass the only one.

    Args:
        guess: a key, which `reached` elements reach; masks: which.

    Returns:
        a guess for a similar block.
    """
    enough = len(keys)
    if not kept <= reached <= enough:
        guess, reached = _coarse_threshold(bits, length, kept, enough, guess, reached, most)
        if reached > enough:  # only because of ties
            ties = kept - np.int64(_count(bits, length, bits.dtype.type(guess + 1), most))
            _collect(bits, length, guess, most, ties, kept, found)
            return guess
        _masks(bits, length, guess, masks)
    _positions(masks, length, found, ahead)
    for i in range(reached):
        keys[i] = bits[found[i]] & most
    threshold = _fine_threshold(keys, reached, kept, guess, most)
    ties = kept - np.int64(_count(keys, reached, bits.dtype.type(threshold + 1), most))
    count = np.uint64(0)
    for i in range(reached):  # without a branch, which no processor could predict
        tied = np.int64(keys[i] == threshold)
        found[count] = found[i]
        count += np.uint64(np.int64(keys[i] > threshold) | (tied & np.int64(ties > 0)))
        ties -= tied
    return guess


# Eight entries of the window at a time. Numba vectorises no loop that looks numbers up.

EIGHT = 8
F32x8, F64x8 = ir.VectorType(ir.FloatType(), EIGHT), ir.VectorType(ir.DoubleType(), EIGHT)


class _Sums(types.Type):
    """Eight float64 sums, which stay in registers."""

    def __init__(self) -> None:
        super().__init__("eight float64")


@register_model(_Sums)
class _SumsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, F64x8)


SUMS = _Sums()


def _eight_values(builder: ir.IRBuilder, code: int, values: ir.Value, entry: ir.Value) -> ir.Value:
    """Consecutive values of the window, float32 or bfloat16, as float32."""
    words, halves = ir.VectorType(I32, EIGHT), ir.VectorType(I16, EIGHT)
    if code == FLOAT32:
        first = builder.gep(builder.inttoptr(values, ir.FloatType().as_pointer()), [entry])
        return builder.load(builder.bitcast(first, F32x8.as_pointer()), align=4)
    first = builder.gep(builder.inttoptr(values, I16.as_pointer()), [entry])
    bits = builder.zext(builder.load(builder.bitcast(first, halves.as_pointer()), align=2), words)
    return builder.bitcast(builder.shl(bits, ir.Constant(words, [16] * EIGHT)), F32x8)


def _products_adder(value_code: int, index_size: int) -> Callable[..., Any]:
    """Adds to eight sums the products of values of the window, float32 or bfloat16, and what a float32 table holds at
    their indices. Products of bfloat16 numbers are taken in float32, others in float64."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        sums, values, indices, entry, table = arguments
        first_index = builder.gep(builder.inttoptr(indices, (I8 if index_size == 1 else I16).as_pointer()), [entry])
        first_number = builder.inttoptr(table, ir.FloatType().as_pointer())
        numbers = ir.Constant(F32x8, ir.Undefined)
        for lane in range(EIGHT):  # on many processors faster than the instruction that gathers
            index = builder.zext(builder.load(builder.gep(first_index, [ir.Constant(I64, lane)])), I64)
            number = builder.load(builder.gep(first_number, [index]))
            numbers = builder.insert_element(numbers, number, ir.Constant(I32, lane))
        value = _eight_values(builder, value_code, values, entry)
        if value_code == FLOAT32:
            return builder.fadd(sums, builder.fmul(builder.fpext(numbers, F64x8), builder.fpext(value, F64x8)))
        return builder.fadd(sums, builder.fpext(builder.fmul(numbers, value), F64x8))

    @_instruction
    def add_products(typing_context: Any, sums: Any, values: Any, indices: Any, entry: Any, table: Any) -> Any:
        return SUMS(SUMS, types.int64, types.int64, types.int64, types.int64), codegen

    return add_products


_add_bf16_u8, _add_bf16_u16 = _products_adder(BFLOAT16, 1), _products_adder(BFLOAT16, 2)
_add_f32_u8, _add_f32_u16 = _products_adder(FLOAT32, 1), _products_adder(FLOAT32, 2)


@_jit
def _add_products(code: int, size: int, sums: Any, values: int, indices: int, entry: int, table: int) -> Any:
    if code == FLOAT32:
        if size == 1:
            return _add_f32_u8(sums, values, indices, entry, table)
        return _add_f32_u16(sums, values, indices, entry, table)
    if size == 1:
        return _add_bf16_u8(sums, values, indices, entry, table)
    return _add_bf16_u16(sums, values, indices, entry, table)


@_instruction
def _no_sums(typing_context: Any) -> Any:
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return ir.Constant(F64x8, [0.0] * EIGHT)

    return SUMS(), codegen


@_instruction
def _total(typing_context: Any, sums: Any) -> Any:
    """The sum of eight, always in the same order."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        total = arguments[0]
        for half in (4, 2, 1):
            sides = (ir.Constant(ir.VectorType(I32, half), list(range(at, at + half))) for at in (0, half))
            total = builder.fadd(*(builder.shuffle_vector(total, total, side) for side in sides))
        return builder.extract_element(total, ir.Constant(I32, 0))

    return types.float64(SUMS), codegen


def _eight_products(
    context: Any, builder: ir.IRBuilder, signature: Any, values: ir.Value, entry: ir.Value, weights: ir.Value
) -> ir.Value:
    """A tuple of numbers: consecutive bfloat16 values of the window, each times its weight."""
    product = builder.fmul(_eight_values(builder, BFLOAT16, values, entry), weights)
    terms = [builder.extract_element(product, ir.Constant(I32, lane)) for lane in range(EIGHT)]
    return context.make_tuple(builder, signature.return_type, terms)


@_instruction
def _eight_terms(typing_context: Any, values: Any, entry: Any, weight: Any) -> Any:
    """Eight consecutive bfloat16 values, each times a weight."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        values, entry, weight = arguments
        weights = ir.Constant(F32x8, ir.Undefined)
        for lane in range(EIGHT):
            weights = builder.insert_element(weights, weight, ir.Constant(I32, lane))
        return _eight_products(context, builder, signature, values, entry, weights)

    return types.UniTuple(types.float32, EIGHT)(types.int64, types.int64, types.float32), codegen


@_instruction
def _eight_terms_of_rows(typing_context: Any, values: Any, entry: Any, weights: Any) -> Any:
    """The same, with a weight for each at an address."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        values, entry, weights = arguments
        weights = builder.load(builder.inttoptr(weights, F32x8.as_pointer()), align=4)
        return _eight_products(context, builder, signature, values, entry, weights)

    return types.UniTuple(types.float32, EIGHT)(types.int64, types.int64, types.int64), codegen


@_jit
def _product(code: int, one: float, other: float) -> float:
    """Of two float32 numbers that have been values of a window; in float32 where that is exact (see `_dots_kernel`)."""
    return np.float64(one) * np.float64(other) if code == FLOAT32 else np.float64(one * other)


# Entries that may meet the newest row. Its positions make two sets of bytes, of their highest bits and of their lowest.
# For 32 bytes one instruction looks up what a table of 16 holds for them: with that, 32 positions are compared with
# both sets without going to memory. Where the newest row is short, few positions are in both and not in the row.

BYTES = ir.VectorType(I8, 32)
TABLES = 64  # bytes of the two sets: two tables of 16 each


def _looks_up_bytes() -> bool:
    """Whether Numba compiles for a processor with that instruction, AVX2's."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return "+avx2" in features.split(",")


LOOKS_UP_BYTES = _looks_up_bytes()


@_jit
def _include(tables: np.ndarray, shift: int, position: int) -> None:
    """Adds a position to both sets.

    The highest bit of a byte says in which table, its lowest four say where; which bit there is said in both sets by
    bits 4 to 6 of the upper byte.
    """
    upper, lower = position >> shift, position & 255
    bit = 1 << ((upper >> 4) & 7)
    tables[upper >> 3 & 16 | upper & 15] |= bit
    tables[32 + (lower >> 3 & 16 | lower & 15)] |= bit


def _looked_up(builder: ir.IRBuilder, table: ir.Value, places: ir.Value) -> ir.Value:
    """What a table of 16 bytes holds for 32 others: at their lowest four bits, but 0 where the highest is set."""
    look_up = builder.module.declare_intrinsic("llvm.x86.avx2.pshuf.b", (), ir.FunctionType(BYTES, [BYTES, BYTES]))
    twice = ir.Constant(ir.VectorType(I32, 32), [*range(16), *range(16)])
    return builder.call(look_up, [builder.shuffle_vector(table, table, twice), places])


def _looked_up_in_two(builder: ir.IRBuilder, tables: Sequence[ir.Value], places: ir.Value) -> ir.Value:
    """The same, where the highest bit is set of the second table."""
    flipped = builder.xor(places, ir.Constant(BYTES, [128] * 32))
    return builder.or_(_looked_up(builder, tables[0], places), _looked_up(builder, tables[1], flipped))


def _upper_and_lower(builder: ir.IRBuilder, indices: ir.Value, shift: ir.Value) -> list[ir.Value]:
    """The bytes of the highest bits of 32 indices of two bytes, and those of the lowest. Of 32 the second and the third
    eight are exchanged."""
    words = ir.VectorType(I16, 16)
    pack = builder.module.declare_intrinsic("llvm.x86.avx2.packuswb", (), ir.FunctionType(BYTES, [words, words]))
    first = builder.inttoptr(indices, words.as_pointer())
    both = [builder.load(builder.gep(first, [ir.Constant(I64, n)]), align=2) for n in range(2)]
    shifts = builder.insert_element(ir.Constant(words, ir.Undefined), builder.trunc(shift, I16), ir.Constant(I32, 0))
    shifts = builder.shuffle_vector(shifts, shifts, ir.Constant(ir.VectorType(I32, 16), [0] * 16))
    upper = builder.call(pack, [builder.lshr(index, shifts) for index in both])
    return [upper, builder.call(pack, [builder.and_(index, ir.Constant(words, [255] * 16)) for index in both])]


def _meeting_masker(index_size: int) -> Callable[..., Any]:
    """64 bits: which of 64 positions may be in the newest row. All, where the processor cannot tell."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        if not LOOKS_UP_BYTES:
            return ir.Constant(I64, -1)
        indices, tables, shift = arguments
        first = builder.inttoptr(tables, ir.VectorType(I8, 16).as_pointer())
        table = [builder.load(builder.gep(first, [ir.Constant(I64, n)]), align=1) for n in range(4)]
        bits = ir.Constant(ir.VectorType(I8, 16), [1 << n % 8 for n in range(16)])
        halves = []
        for half in range(2):
            address = builder.add(indices, ir.Constant(I64, 32 * index_size * half))
            if index_size == 1:
                upper = builder.load(builder.inttoptr(address, BYTES.as_pointer()), align=1)
            else:
                upper, lower = _upper_and_lower(builder, address, shift)
            bit = _looked_up(builder, bits, builder.lshr(upper, ir.Constant(BYTES, [4] * 32)))
            held = builder.and_(bit, _looked_up_in_two(builder, table[:2], upper))
            if index_size == 2:
                held = builder.and_(held, _looked_up_in_two(builder, table[2:], lower))
                eights = builder.bitcast(held, ir.VectorType(I64, 4))
                eights = builder.shuffle_vector(eights, eights, ir.Constant(ir.VectorType(I32, 4), [0, 2, 1, 3]))
                held = builder.bitcast(eights, BYTES)
            halves.append(builder.icmp_unsigned("!=", held, ir.Constant(BYTES, [0] * 32)))
        lanes = ir.Constant(ir.VectorType(I32, LANES), list(range(LANES)))
        return builder.bitcast(builder.shuffle_vector(*halves, lanes), I64)

    @_instruction
    def meeting_mask(typing_context: Any, indices: Any, tables: Any, shift: Any) -> Any:
        return types.uint64(types.int64, types.int64, types.int64), codegen

    return meeting_mask


_meeting_mask_u8, _meeting_mask_u16 = _meeting_masker(1), _meeting_masker(2)


@_jit
def _may_meet(
    size: int, indices: int, first: int, last: int, entries: int, tables: int, shift: int,
    values: int, bytes_a_value: int, found: np.ndarray,
) -> int:  # fmt: skip
    """Which of the entries from `first` to before `last` of a block, which has 64 or more, may meet the newest row.

    As in `_positions` four are written at a time, for which there must be room; their values are fetched.

    Returns:
        how many.
    """
    count = np.uint64(0)
    for start in range(first, last, LANES):
        before = max(start + LANES - entries, 0)  # the last 64 entries begin that much earlier
        if size == 1:
            mask = _meeting_mask_u8(indices + start - before, tables, shift)
        else:
            mask = _meeting_mask_u16(indices + 2 * (start - before), tables, shift)
        mask >>= np.uint64(before)
        place, more = count, _bits_set(mask)
        count += np.uint64(more)
        while True:
            for number in range(4):
                entry = np.uint64(start) + _trailing_zeros(mask)
                found[place + np.uint64(number)] = entry
                _prefetch(values + np.int64(entry) * bytes_a_value)
                mask &= mask - np.uint64(1)
            if more <= 4:
                break
            more -= 4
            place += np.uint64(4)
    return np.int64(count)


@_jit
def _add_dots_of_few(
    value_code: int, index_size: int, values: int, indices: int, window: int, kept: int, row: int, newest: np.ndarray,
    unit: float, shift: int, tables: np.ndarray, found: np.ndarray, total: np.ndarray,
) -> None:  # fmt: skip
    """Adds to `total` the inner products of the rows of a block with one of them, which `newest` holds in this unit."""
    tables[:] = 0
    for j in range(row * kept, (row + 1) * kept):
        _include(tables, shift, _index(index_size, indices, j))
    entries, inverse = window * kept, np.uint64((1 << 32) // kept + 1)
    for start in range(0, entries, PORTION):
        stop, address = min(start + PORTION, entries), tables.ctypes.data
        count = _may_meet(index_size, indices, start, stop, entries, address, shift, values, SIZES[value_code], found)
        for place in range(count):
            j = np.int64(found[place])
            product = _product(value_code, newest[_index(index_size, indices, j)], _value(value_code, values, j))
            total[found[place] * inverse >> np.uint64(32)] += unit * product  # that is j // kept


# Rows of float64 matrices.


@partial(_jit, fastmath={"reassoc", "contract"})
def _dot(one: np.ndarray, other: np.ndarray, length: int) -> float:
    total = 0.0
    for j in range(length):
        total += one[j] * other[j]
    return total


@_jit
def _add_multiple(total: np.ndarray, factor: float, row: np.ndarray, length: int) -> None:
    for j in range(length):
        total[j] += factor * row[j]


@partial(_jit, fastmath={"reassoc", "contract"})
def _add_multiple_and_dot(row: np.ndarray, factor: float, other: np.ndarray, third: np.ndarray, length: int) -> float:
    """row ← row + factor · other; its inner product with the third"""
    total = 0.0
    for j in range(length):
        number = row[j] + factor * other[j]
        row[j] = number
        total += number * third[j]
    return total


@_jit
def _add_multiples(
    total: np.ndarray, factor: float, other: np.ndarray, other_factor: float, row: np.ndarray, length: int
) -> None:
    for j in range(length):
        total[j] += factor * row[j]
        other[j] += other_factor * row[j]


@_jit
def _float64s(address: int, first: int, length: int) -> np.ndarray:
    return carray(_pointer(address + 8 * first), length, np.float64)


# The kernels. Each takes shares of the blocks of all parameters, or of other pieces, until none is left. What it
# allocates it allocates before: a thread that finds no memory leaves the work to the others.


@_jit
def _parameter(table: int, parameters: int, number: int) -> tuple[int, int, int, int, int, int, int, int, int]:
    """A row of the table, which is stored column by column: the number of the first block behind this parameter, n, B,
    k, k of the tail, and addresses, of values, of indices, and of the two tensors of n elements of an operation."""
    return (
        _load_i64(table, number),
        _load_i64(table, number + parameters),
        _load_i64(table, number + parameters * 2),
        _load_i64(table, number + parameters * 3),
        _load_i64(table, number + parameters * 4),
        _load_i64(table, number + parameters * 5),
        _load_i64(table, number + parameters * 6),
        _load_i64(table, number + parameters * 7),
        _load_i64(table, number + parameters * 8),
    )


@cache
def _compress_kernel(wide: bool) -> Kernel:
    real, integer, code = (np.float64, np.int64, FLOAT64) if wide else (np.float32, np.int32, FLOAT32)

    @_kernel(wide)
    def compress(call: int) -> None:
        (
            _, table, parameters, largest, grad_code, error_code, value_code, index_size, slot, finite, window,
        ) = _pieces_and_arguments(call, 10)  # fmt: skip
        row = _load_i64(slot, 0)
        most = integer(np.iinfo(integer).max)
        scratch = np.zeros(largest + LANES, real)  # a mask may look beyond the end
        masks = np.empty(largest // LANES + 1, np.uint64)
        found = np.zeros(largest + 4, np.uint16)
        all_keys = np.empty(largest, integer)
        guess = integer(0)
        grad_size, error_size = SIZES[grad_code], SIZES[error_code]
        first, last = _take_share(call)
        while first < last:
            begin = np.int64(0)
            for number in range(parameters):
                end, numel, size, kept, kept_in_tail, values, indices, grad, error = _parameter(
                    table, parameters, number
                )
                keys = all_keys[: min(size, kept + max(kept >> 1, 64))]
                for block in range(max(first, begin) - begin, min(last, end) - begin):
                    start = block * size
                    length = min(size, numel - start)
                    chosen = kept if length == size else kept_in_tail
                    entry = (block * window + row) * kept
                    if grad == 0:
                        for j in range(chosen):
                            _store_value(value_code, values, entry + j, np.float32(0))
                        continue
                    if _load_u8(finite, 0) == 0:
                        for j in range(chosen):
                            _store_value(value_code, values, entry + j, np.float32(0))
                            _store_index(index_size, indices, entry + j, j)
                        continue
                    in_place = grad_code == code and error_code == code and length % LANES == 0
                    if in_place:
                        a = carray(_pointer(error + start * error_size), length, real)
                        reached = np.int64(0)
                        for j in range(0, length, LANES):
                            at = (start + j) * error_size
                            mask = _add_and_mask(error + at, grad + at, guess)
                            masks[j // LANES] = mask
                            reached += _bits_set(mask)
                    else:
                        a = scratch
                        _read(grad_code, grad, start, length, a)
                        if error_code != NONE:
                            _add(error_code, error, start, length, a)
                        reached = _masks(a.view(integer), length, guess, masks)
                    following = start + size
                    ahead = (grad + following * grad_size, grad_size, error + following * error_size, error_size)
                    guess = _select(a.view(integer), length, chosen, guess, reached, most, masks, found, keys, ahead)
                    for j in range(chosen):
                        position = found[j]
                        stored = _store_value(value_code, values, entry + j, np.float32(a[position]))
                        _store_index(index_size, indices, entry + j, position)
                        a[position] -= stored
                    if error_code != NONE and not in_place:
                        _write(error_code, error, start, length, a)
                begin = end
            first, last = _take_share(call)

    return compress


@cache
def _dots_kernel(value_code: int, index_size: int) -> Kernel:
    # The product of two bfloat16 or float16 numbers is exact in float32, where one factor is scaled so that it neither
    # overflows nor (above 1e-29 times the largest) underflows.
    narrow = value_code != FLOAT32
    eight = value_code != FLOAT16  # at a time
    bytes_a_value = SIZES[value_code]

    @_kernel(value_code, index_size)
    def dots(call: int) -> None:
        pieces, table, parameters, largest, sums, blocks, slot, window, few = _pieces_and_arguments(call, 8)
        row = _load_i64(slot, 0)
        shift = 0
        while (largest - 1) >> shift > 255:
            shift += 1
        newest = np.zeros(largest, np.float32)
        tables = np.empty(TABLES, np.uint8)
        found = np.empty(PORTION + 4, np.uint64)
        total = np.empty(window, np.float64)
        first, last = _take_share(call)
        while first < last:
            for piece in range(first, last):
                total[:] = 0.0
                first_block, last_block = piece * blocks // pieces, (piece + 1) * blocks // pieces
                begin = np.int64(0)
                for number in range(parameters):
                    end, numel, size, kept, kept_in_tail, values, indices, _, _ = _parameter(table, parameters, number)
                    for block in range(max(first_block, begin) - begin, min(last_block, end) - begin):
                        chosen = kept if (block + 1) * size <= numel else kept_in_tail
                        entry = block * window * kept
                        own = entry + row * kept
                        unit = 1.0
                        if narrow:
                            highest = np.float32(0)
                            for j in range(own, own + chosen):
                                highest = max(highest, abs(_value(value_code, values, j)))
                            unit = math.ldexp(1.0, (_bits_of_float(highest) >> 23) - 126)
                        for j in range(own, own + chosen):
                            newest[_index(index_size, indices, j)] = np.float64(_value(value_code, values, j)) / unit
                        if chosen == kept <= few:  # padding may hold anything
                            _add_dots_of_few(
                                value_code, index_size, values + entry * bytes_a_value, indices + entry * index_size,
                                window, kept, row, newest, unit, shift, tables, found, total,
                            )  # fmt: skip
                        else:
                            for i in range(window):
                                first_entry = entry + i * kept
                                rest = first_entry + (chosen - chosen % EIGHT if eight else 0)
                                eight_dots = _no_sums()
                                for j in range(first_entry, rest, EIGHT):
                                    eight_dots = _add_products(
                                        value_code, index_size, eight_dots, values, indices, j, newest.ctypes.data
                                    )
                                dot = _total(eight_dots)
                                for j in range(rest, first_entry + chosen):
                                    one = newest[_index(index_size, indices, j)]
                                    dot += _product(value_code, one, _value(value_code, values, j))
                                total[i] += unit * dot
                        for j in range(own, own + chosen):
                            newest[_index(index_size, indices, j)] = np.float32(0)
                    begin = end
                for i in range(window):
                    _store_f64(sums, piece * window + i, total[i])
            first, last = _take_share(call)

    return dots


@cache
def _add_up_kernel() -> Kernel:
    @_kernel()
    def add_up(call: int) -> None:
        """The sum of the rows of a float64 matrix, added in order. The pieces are its columns."""
        columns, matrix, rows, result = _pieces_and_arguments(call, 3)
        first, last = _take_share(call)
        while first < last:
            for column in range(first, last):
                _store_f64(result, column, _load_f64(matrix, column))
            for row in range(1, rows):
                for column in range(first, last):
                    total = _load_f64(result, column) + _load_f64(matrix, row * columns + column)
                    _store_f64(result, column, total)
            first, last = _take_share(call)

    return add_up


@cache
def _apply_kernel(wide: bool, value_code: int, index_size: int) -> Kernel:
    real = np.float64 if wide else np.float32
    eight = value_code == BFLOAT16 and not wide  # at a time: a third fewer instructions

    @_kernel(wide, value_code, index_size)
    def apply(call: int) -> None:
        (
            _, table, parameters, largest, target_code, momentum_code, weights, weight_code,
            scale, scale_code, step, step_code, decay, decay_code, window,
        ) = _pieces_and_arguments(call, 14)  # fmt: skip
        target_factor = real(_number(scale_code, scale, 0))
        update_factor = real(_number(step_code, step, 0))
        momentum_factor = real(_number(decay_code, decay, 0))
        weight = np.empty(window, real)
        for i in range(window):
            weight[i] = real(_number(weight_code, weights, i))
        spread, spread_kept = np.empty(window * SHORT if eight else 0, np.float32), np.int64(0)
        update = np.zeros(largest, real)
        target_size = SIZES[target_code]
        portion = 64 * (largest * target_size * FETCHING_ROWS // (64 * window) + 1)  # bytes
        first, last = _take_share(call)
        while first < last:
            begin = np.int64(0)
            for number in range(parameters):
                end, numel, size, kept, kept_in_tail, values, indices, target, momentum = _parameter(
                    table, parameters, number
                )
                if eight and spread_kept != kept <= SHORT:  # a weight for each entry of a block
                    spread_kept = kept
                    for i in range(window):
                        spread[i * kept : (i + 1) * kept] = weight[i]
                for block in range(max(first, begin) - begin, min(last, end) - begin):
                    start = block * size
                    length = min(size, numel - start)
                    chosen = kept if length == size else kept_in_tail
                    before = block * window * kept  # entries
                    unfetched, behind = target + start * target_size, target + (start + length) * target_size
                    for first_row in range(0, window, FETCHING_ROWS):
                        for line in range(unfetched, min(unfetched + portion, behind), 64):
                            _prefetch(line)
                        unfetched += portion
                        last_row = min(first_row + FETCHING_ROWS, window)
                        # Three loops, as one that can do all is slow with few entries.
                        if eight and chosen == kept <= SHORT:
                            rest = last_row * kept - (last_row - first_row) * kept % EIGHT
                            for j in range(first_row * kept, rest, EIGHT):
                                terms = _eight_terms_of_rows(values, before + j, spread.ctypes.data + 4 * j)
                                for lane in range(EIGHT):
                                    update[_index(index_size, indices, before + j + lane)] += terms[lane]
                            for j in range(rest, last_row * kept):
                                term = _value(value_code, values, before + j) * spread[j]
                                update[_index(index_size, indices, before + j)] += term
                        elif eight and chosen >= EIGHT:
                            for i in range(first_row, last_row):
                                entry, factor = before + i * kept, weight[np.uint64(i)]
                                rest = entry + chosen - chosen % EIGHT
                                for j in range(entry, rest, EIGHT):
                                    terms = _eight_terms(values, j, factor)
                                    for lane in range(EIGHT):
                                        update[_index(index_size, indices, j + lane)] += terms[lane]
                                for j in range(rest, entry + chosen):
                                    update[_index(index_size, indices, j)] += _value(value_code, values, j) * factor
                        else:
                            for i in range(first_row, last_row):
                                entry, factor = before + i * kept, weight[np.uint64(i)]
                                for j in range(entry, entry + chosen):
                                    term = real(_value(value_code, values, j)) * factor
                                    update[_index(index_size, indices, j)] += term
                    if momentum != 0:
                        _blend(momentum_code, momentum, start, length, momentum_factor, update, real(1), False)
                    _blend(target_code, target, start, length, target_factor, update, update_factor, True)
                begin = end
            first, last = _take_share(call)

    return apply


@cache
def _squares_kernel() -> Kernel:
    @_kernel()
    def squares(call: int) -> None:
        """Sums of squares over the pieces, into `sums`; behind them goes infinity, and no more is read, once one is not
        finite.

        The table has three columns: the number of the first chunk behind a gradient, n, and the address.
        """
        pieces, table, gradients, code, sums, chunks = _pieces_and_arguments(call, 5)
        first, last = _take_share(call)
        while first < last:
            for piece in range(first, last):
                if _load_f64(sums, pieces) != 0.0:
                    break
                total = 0.0
                first_chunk, last_chunk = piece * chunks // pieces, (piece + 1) * chunks // pieces
                begin = np.int64(0)
                for number in range(gradients):
                    end, numel = _load_i64(table, number), _load_i64(table, number + gradients)
                    address = _load_i64(table, number + gradients * 2)
                    for chunk in range(max(first_chunk, begin) - begin, min(last_chunk, end) - begin):
                        start = chunk * CHUNK
                        total += _sum_of_squares(code, address, start, min(start + CHUNK, numel))
                    begin = end
                if not math.isfinite(total):
                    piece, total = pieces, math.inf
                _store_f64(sums, piece, total)
            first, last = _take_share(call)

    return squares


# M-FAC's inverse root R (see `kernels.update_inverse_root_`). As column t of RᵀR is known, so is vᵀR for the vector v
# of the reflection: the reflected matrix R' = R + φ v vᵀR, p = R's, R'ᵀp and the following column of R'ᵀR' come of one
# pass over the rows, in pieces. Another is over those of S. What the first leaves for the next is in `scratch`, vectors
# of m numbers: p; then R'ᵀp of each piece; then its part of the column.

COORDINATES, SUMS_OF_PIECES = range(2)


@_jit
def _sum_of_pieces(scratch: int, first: int, pieces: int, window: int) -> np.ndarray:
    total = np.zeros(window, np.float64)
    for piece in range(first, first + pieces):
        _add_multiple(total, 1.0, _float64s(scratch, piece * window, window), window)
    return total


@cache
def _reflect_kernel() -> Kernel:
    @_kernel()
    def reflect(call: int) -> None:
        """The pass over R, but for row t."""
        pieces, root, column, gram, slot, scratch, window = _pieces_and_arguments(call, 6)
        t = _load_i64(slot, 0)
        following = (t + 1) % window
        new = _float64s(gram, t * window, window).copy()
        new[t] = 0.0
        vR = _float64s(column, 0, window).copy()
        own = _float64s(root, t * window, window)
        norm = math.sqrt(vR[t])
        factor = -1 / (norm * (norm + abs(own[t])))
        _add_multiple(vR, math.copysign(norm, own[t]), own, window)
        first, last = _take_share(call)
        while first < last:
            for piece in range(first, last):
                row_sum = _float64s(scratch, (SUMS_OF_PIECES + piece) * window, window)
                column_sum = _float64s(scratch, (SUMS_OF_PIECES + pieces + piece) * window, window)
                row_sum[:] = 0.0
                column_sum[:] = 0.0
                for i in range(piece * window // pieces, (piece + 1) * window // pieces):
                    row = _float64s(root, i * window, window)
                    p = 0.0
                    if i != t:
                        p = _add_multiple_and_dot(row, factor * row[t], vR, new, window)
                        row[t] = 0.0
                        _add_multiples(row_sum, p, column_sum, row[following], row, window)
                    _store_f64(scratch, COORDINATES * window + i, p)
            first, last = _take_share(call)

    return reflect


@cache
def _border_kernel() -> Kernel:
    @_kernel()
    def border(call: int) -> None:
        """Row t of R, x and the following column."""
        _, root, column, gram, slot, x, scratch, window, pieces, ridge = _pieces_and_arguments(call, 9)
        t, least = _load_i64(slot, 0), _load_f64(ridge, 0)
        following = (t + 1) % window
        p = _float64s(scratch, COORDINATES * window, window)
        schur = max(least + _load_f64(gram, t * window + t) - _dot(p, p, window), least)
        row = _sum_of_pieces(scratch, SUMS_OF_PIECES, pieces, window)
        ahead = _sum_of_pieces(scratch, SUMS_OF_PIECES + pieces, pieces, window)
        row[t] = -1.0
        first, last = _take_share(call)
        if first < last:
            at_following = -row[following] / math.sqrt(schur)
            for j in range(window):
                own = -row[j] / math.sqrt(schur)
                _store_f64(root, t * window + j, own)
                _store_f64(column, j, ahead[j] + at_following * own)
                _store_f64(x, j, -row[j] / schur)

    return border


@cache
def _missed_kernel() -> Kernel:
    @_kernel()
    def missed(call: int) -> None:
        """The pass over S."""
        pieces, gram, slot, x_at, miss, window, ridge = _pieces_and_arguments(call, 6)
        t, x = _load_i64(slot, 0), _float64s(x_at, 0, window)
        first, last = _take_share(call)
        while first < last:
            for i in range(first * window // pieces, last * window // pieces):
                product = _dot(_float64s(gram, i * window, window), x, window) + _load_f64(ridge, 0) * x[i]
                _store_f64(miss, i, np.float64(i == t) - product)
            first, last = _take_share(call)

    return missed


# Threads.


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


def _run(kernel: Kernel, arguments: tuple[int, ...], pieces: int, work: int) -> None:
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


# The operations.


class Group(NamedTuple):
    """What the kernels are told about a group of parameters, and totals over these."""

    table: "array[int]"
    parameters: int
    largest: int  # elements of a block
    blocks: int
    elements: int
    entries: int  # of a row of the window

    @property
    def arguments(self) -> tuple[int, int, int]:
        return self.table.buffer_info()[0], self.parameters, self.largest


def _group(rows: Sequence[Rows], **others: Sequence[Tensor | None]) -> Group:
    """With the table of `_parameter`, whose last two columns are the `others`, in order, or 0 where there are none."""
    layouts = [r.blocks for r in rows]
    ends = list(accumulate(blocks.count for blocks in layouts))
    numels = [blocks.numel for blocks in layouts]
    sizes = [blocks.size for blocks in layouts]
    table = [*ends, *numels, *sizes, *(blocks.kept for blocks in layouts), *(blocks.kept_in_tail for blocks in layouts)]
    for column in group_addresses(rows, CPU, **others):
        table += column
    table += [0] * len(rows) * (2 - len(others))
    entries = sum(blocks.count * blocks.kept for blocks in layouts)
    return Group(array("q", table), len(rows), max(sizes), ends[-1], sum(numels), entries)


def _scalar(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    """The address of a tensor of one element, of any floating point dtype where none is given."""
    return addresses(name, [tensor], dtype or _coded(name, tensor), CPU, [1])[0]


def _slot(slot: Tensor, window: int) -> int:
    """The address of the number of a row, which is in the window."""
    address = _scalar("slot", slot, torch.int64)
    row = ctypes.c_int64.from_address(address).value
    if not 0 <= row < window:
        raise IndexError(f"slot must be from 0 to {window - 1}, got {row}")
    return address


def _coded(name: str, tensor: Tensor) -> torch.dtype:
    """The dtype of a tensor, which is one that kernels read and write."""
    if tensor.dtype not in CODES:
        raise TypeError(f"{name} must be of dtype {', '.join(map(str, CODES))}, got {tensor.dtype}")
    return tensor.dtype


def all_finite(grads: Sequence[Tensor]) -> Tensor:
    found = gradient_addresses(grads, CPU)
    dtype, numels = grads[0].dtype, [grad.numel() for grad in grads]
    ends = list(accumulate(-(-numel // CHUNK) for numel in numels))
    table = array("q", [*ends, *numels, *found])
    pieces = max(1, min(ends[-1], PIECES))
    sums = array("d", bytes(8 * (pieces + 1)))
    arguments = (table.buffer_info()[0], len(grads), CODES[dtype], sums.buffer_info()[0], ends[-1])
    _run(_squares_kernel(), arguments, pieces, sum(numels))
    return torch.full((), sum(sums) <= torch.finfo(accumulation_dtype(dtype)).max, device=CPU)


def compress_(
    grads: Sequence[Tensor | None], errors: Sequence[Tensor], rows: Sequence[Rows], slot: Tensor, finite: Tensor
) -> None:
    group = _group(rows, grads=grads, errors=errors)
    dtype = next((_coded("grads", grad) for grad in grads if grad is not None), torch.float32)
    values, indices, _ = rows[0]
    arguments = (
        *group.arguments, CODES[dtype], CODES[_coded("errors", errors[0])] if errors else NONE,
        CODES[_coded("values", values)], indices.itemsize, _slot(slot, values.shape[1]),
        _scalar("finite", finite, torch.bool), values.shape[1],
    )  # fmt: skip
    _run(_compress_kernel(dtype is torch.float64), arguments, group.blocks, group.elements)


def window_dots(rows: Sequence[Rows], slot: Tensor) -> Tensor:
    group = _group(rows)
    values, indices, _ = rows[0]
    window = values.shape[1]
    pieces = max(1, min(group.blocks, PIECES))
    sums = torch.empty(pieces * window, dtype=torch.float64, device=CPU)
    few = FEW if LOOKS_UP_BYTES and window >= LANES else 0  # of fewer rows a block may not have 64 entries
    arguments = (*group.arguments, sums.data_ptr(), group.blocks, _slot(slot, window), window, few)
    kernel = _dots_kernel(CODES[_coded("values", values)], indices.itemsize)
    _run(kernel, arguments, pieces, group.entries * window)
    if pieces == 1:
        return sums
    total = torch.empty(window, dtype=torch.float64, device=CPU)
    _run(_add_up_kernel(), (sums.data_ptr(), pieces, total.data_ptr()), window, pieces * window)
    return total


def window_apply_(
    targets: Sequence[Tensor],
    momenta: Sequence[Tensor],
    rows: Sequence[Rows],
    weights: Tensor,
    scale: Tensor,
    step: Tensor,
    decay: Tensor,
) -> None:
    group = _group(rows, targets=targets, momenta=momenta)
    dtype, (values, indices, _) = _coded("targets", targets[0]), rows[0]
    window = values.shape[1]
    weights = check_weights(values, weights, window)
    arguments = (
        *group.arguments, CODES[dtype], CODES[_coded("momenta", momenta[0])] if momenta else NONE,
        weights.data_ptr(), CODES[weights.dtype],
        _scalar("scale", scale), CODES[scale.dtype], _scalar("step", step), CODES[step.dtype],
        _scalar("decay", decay), CODES[decay.dtype], window,
    )  # fmt: skip
    kernel = _apply_kernel(dtype is torch.float64, CODES[_coded("values", values)], indices.itemsize)
    _run(kernel, arguments, group.blocks, group.elements + group.entries * window)


def update_inverse_root_(R: Tensor, column: Tensor, S: Tensor, slot: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    window = len(R)
    pieces = -(-window // PIECE_ROWS)
    x, miss = (torch.empty(window, dtype=torch.float64, device=CPU) for _ in range(2))
    vectors = torch.empty(SUMS_OF_PIECES + 2 * pieces, window, dtype=torch.float64, device=CPU)
    scratch, number = vectors.data_ptr(), array("d", [ridge])
    root, gram = (addresses(n, [M], torch.float64, CPU, [window**2])[0] for n, M in (("R", R), ("S", S)))
    (column_at,), at = addresses("column", [column], torch.float64, CPU, [window]), _slot(slot, window)
    reflect, border, missed = _reflect_kernel(), _border_kernel(), _missed_kernel()  # all, before R changes
    ridge_at, work = number.buffer_info()[0], window * window
    _run(reflect, (root, column_at, gram, at, scratch, window), pieces, work)
    _run(border, (root, column_at, gram, at, x.data_ptr(), scratch, window, pieces, ridge_at), 1, window)
    _run(missed, (gram, at, x.data_ptr(), miss.data_ptr(), window, ridge_at), pieces, work)
    return x, miss
