"""Functions for kernels, made of LLVM instructions: those that Numba cannot express, or not as fast.

    memory behind an address          `pointer`, `prefetch`
    64 comparisons at a time          `mask_at_least`, `add_and_mask`, `decode_add_and_mask`: the search of Top-k
    64 codes at a time                `round_to_codes`: numbers in 8 bits
    a call and its shares             `pieces_and_arguments`, `take_number`
    eight entries at a time           `add_*`, `sum_of_eight` for `window_dots`; `eight_terms*` for `window_apply_`
    64 positions at a time            `overlap_mask_*`: which may be positions of the newest row

`pointer` and `take_number` have no counterpart in plain Numba. Plain Numba would be as fast as `pieces_and_arguments`,
but needs an index for each argument. For the others, this is the time of an operation with the fastest plain Numba that
we found, divided by its time with these functions:

    mask_at_least           `compress_`      1.02 to 1.12
    add_and_mask            `compress_`      1.00 to 1.08
    add_*, sum_of_eight     `window_dots`    1.5 to 1.7
    overlap_mask_*          `window_dots`    1.3 to 4.7, by doing without the filter; 5.4 to 5.9 with it
    eight_terms             `window_apply_`  1.03 to 1.20
    eight_terms_of_rows     `window_apply_`  1.19 to 1.24
    prefetch, left out      `window_apply_`  0.90 to 1.16
    prefetch, left out      `compress_`      0.89 to 1.01 for float32, 1.23 for bfloat16

(Numba 0.68.1, AMD Zen 4, one thread, d = 4.2M, in cases that use the function: m of 32 to 256, density 1 to 10%, blocks
of 256 and 4096.)
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model

from efcp.kernels.cpu.dtypes import BFLOAT16, FLOAT32

LANES = 64  # elements that are compared at a time; the results are the bits of one mask


def _instruction(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A decorator for functions made of LLVM instructions. Kernels call them without the typing context.

    It gives type checkers a type for Numba's `intrinsic`, which has none.
    """
    return intrinsic(**options)(function) if options else intrinsic(function)


I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
BYTES = ir.VectorType(I8, 32)


@_instruction
def prefetch(typing_context: Any, address: Any) -> Any:
    """Fetches 64 bytes into the second-level cache. Any address is allowed, even one without memory."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        pointer = I8.as_pointer()
        function_type = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], function_type)
        to_read, second_level, data = (ir.Constant(I32, n) for n in (0, 2, 1))
        builder.call(function, [builder.inttoptr(arguments[0], pointer), to_read, second_level, data])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _in_all_lanes(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
    """A vector of 64 times the same number."""
    vector = ir.VectorType(number.type, LANES)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


def _lanes_at_least(builder: ir.IRBuilder, numbers: ir.Value, key: ir.Value) -> ir.Value:
    """A 64-bit mask: which of 64 integers, with their sign bits cleared, are at least `key`."""
    vector, bits = numbers.type, numbers.type.element.width
    keys = builder.and_(numbers, ir.Constant(vector, [2 ** (bits - 1) - 1] * LANES))
    return builder.bitcast(builder.icmp_signed(">=", keys, _in_all_lanes(builder, key)), I64)


@_instruction
def mask_at_least(typing_context: Any, address: Any, key: Any) -> Any:
    """A 64-bit mask: which of the 64 integers at an address, with their sign bits cleared, are at least `key`."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        vector = ir.VectorType(ir.IntType(key.bitwidth), LANES)
        numbers = builder.load(builder.inttoptr(arguments[0], vector.as_pointer()), align=key.bitwidth // 8)
        return _lanes_at_least(builder, numbers, arguments[1])

    return types.uint64(types.int64, key), codegen


@_instruction
def add_and_mask(typing_context: Any, error: Any, grad: Any, key: Any) -> Any:
    """Adds the 64 numbers at `grad` to those at `error`, in place. Returns `mask_at_least` of the sums."""

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
def decode_add_and_mask(typing_context: Any, codes: Any, scale: Any, grad: Any, total: Any, key: Any) -> Any:
    """Writes 64 float32 to `total`: those at `grad`, and codes of 8 bits times their scale. Returns `mask_at_least`."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        codes, scale, grad, total, key = arguments
        floats = ir.VectorType(ir.FloatType(), LANES)
        stored = ir.VectorType(I8, LANES)
        code = builder.load(builder.inttoptr(codes, stored.as_pointer()), align=1)
        code = builder.sitofp(builder.sext(code, ir.VectorType(I32, LANES)), floats)
        numbers = builder.load(builder.inttoptr(grad, floats.as_pointer()), align=4)
        numbers = builder.fadd(numbers, builder.fmul(code, _in_all_lanes(builder, scale)))
        builder.store(numbers, builder.inttoptr(total, floats.as_pointer()), align=4)
        return _lanes_at_least(builder, builder.bitcast(numbers, ir.VectorType(I32, LANES)), key)

    return types.uint64(types.int64, types.float32, types.int64, types.int64, types.int32), codegen


def _has_avx2() -> bool:
    """Whether Numba compiles for a processor with AVX2."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return "+avx2" in features.split(",")


HAS_AVX2 = _has_avx2()


def _packed(builder: ir.IRBuilder, numbers: ir.Value) -> ir.Value:
    """64 float32 as 64 integers of 8 bits, rounded to even, by instructions of AVX2."""

    def intrinsic_of(name: str, result: ir.Type, *arguments: ir.Type) -> Any:
        return builder.module.declare_intrinsic(f"llvm.x86.{name}", (), ir.FunctionType(result, arguments))

    def lanes(first: ir.Value, second: ir.Value, places: Sequence[int]) -> ir.Value:
        return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(places)), list(places)))

    floats, words, halves = ir.VectorType(ir.FloatType(), 8), ir.VectorType(I32, 8), ir.VectorType(I16, 16)
    convert = intrinsic_of("avx.cvt.ps2dq.256", words, floats)
    pack_words, pack_halves = (
        intrinsic_of("avx2.packssdw", halves, words, words),
        intrinsic_of("avx2.packsswb", BYTES, halves, halves),
    )
    packed = []
    for first in range(0, LANES, 32):
        eights = [
            builder.call(convert, [lanes(numbers, numbers, range(at, at + 8))]) for at in range(first, first + 32, 8)
        ]
        pairs = [builder.call(pack_words, eights[at : at + 2]) for at in (0, 2)]
        fours = builder.bitcast(builder.call(pack_halves, pairs), words)
        packed.append(lanes(fours, fours, [0, 4, 1, 5, 2, 6, 3, 7]))  # packing takes turns between halves of a register
    return builder.bitcast(lanes(packed[0], packed[1], range(16)), ir.VectorType(I8, LANES))


@_instruction
def round_to_codes(typing_context: Any, numbers: Any, inverse: Any, codes: Any) -> Any:
    """Writes 64 codes of 8 bits: the float32 at `numbers` times `inverse`, rounded to even. None may exceed 127.5."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        numbers, inverse, codes = arguments
        floats = ir.VectorType(ir.FloatType(), LANES)
        own = builder.load(builder.inttoptr(numbers, floats.as_pointer()), align=4)
        scaled = builder.fmul(own, _in_all_lanes(builder, inverse))
        if HAS_AVX2:
            code = _packed(builder, scaled)
        else:  # the sum has no place for fractions, and its lowest bits are the integer
            rounded = builder.fadd(scaled, ir.Constant(floats, [1.5 * 2.0**23] * LANES))
            code = builder.trunc(builder.bitcast(rounded, ir.VectorType(I32, LANES)), ir.VectorType(I8, LANES))
        builder.store(code, builder.inttoptr(codes, code.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), codegen


@_instruction
def pointer(typing_context: Any, address: Any) -> Any:
    """An address as a pointer, for `numba.carray`, which makes an array of the memory there."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return builder.inttoptr(arguments[0], I8.as_pointer())

    return types.voidptr(types.int64), codegen


@partial(_instruction, prefer_literal=True)
def pieces_and_arguments(typing_context: Any, call: Any, count: Any) -> Any:
    """The number of pieces of a call, followed by its first `count` arguments."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        first = builder.inttoptr(arguments[0], I64.as_pointer())
        numbers = [builder.load(builder.gep(first, [ir.Constant(I64, 2 + n)])) for n in range(count.literal_value + 1)]
        return context.make_tuple(builder, signature.return_type, numbers)

    return types.UniTuple(types.int64, count.literal_value + 1)(types.int64, count), codegen


@_instruction
def take_number(typing_context: Any, call: Any) -> Any:
    """The number of the next share of a call. No other thread gets the same one."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        following = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.atomic_rmw("add", following, ir.Constant(I64, 1), "monotonic")

    return types.int64(types.int64), codegen


EIGHT = 8
F32x8, F64x8 = ir.VectorType(ir.FloatType(), EIGHT), ir.VectorType(ir.DoubleType(), EIGHT)


class _Sums(types.Type):
    """Numba's type of eight float64 sums, which stay in registers."""

    def __init__(self) -> None:
        super().__init__("eight float64")


@register_model(_Sums)
class _SumsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, F64x8)


SUMS = _Sums()


def _eight_values(builder: ir.IRBuilder, code: int, values: ir.Value, entry: ir.Value) -> ir.Value:
    """Eight consecutive values of the window, float32 or bfloat16, as float32."""
    words, halves = ir.VectorType(I32, EIGHT), ir.VectorType(I16, EIGHT)
    if code == FLOAT32:
        first = builder.gep(builder.inttoptr(values, ir.FloatType().as_pointer()), [entry])
        return builder.load(builder.bitcast(first, F32x8.as_pointer()), align=4)
    first = builder.gep(builder.inttoptr(values, I16.as_pointer()), [entry])
    bits = builder.zext(builder.load(builder.bitcast(first, halves.as_pointer()), align=2), words)
    return builder.bitcast(builder.shl(bits, ir.Constant(words, [16] * EIGHT)), F32x8)


def _products_adder(value_code: int, index_size: int) -> Callable[..., Any]:
    """Makes a function that adds eight products to eight sums.

    A product is a value of the window, float32 or bfloat16, times the number that a float32 table holds at its index.
    With bfloat16 values, products are taken in float32, else in float64.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        sums, values, indices, entry, table = arguments
        first_index = builder.gep(builder.inttoptr(indices, (I8 if index_size == 1 else I16).as_pointer()), [entry])
        first_number = builder.inttoptr(table, ir.FloatType().as_pointer())
        numbers = ir.Constant(F32x8, ir.Undefined)
        for lane in range(EIGHT):  # on many processors faster than a gather instruction
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


add_bf16_u8, add_bf16_u16 = _products_adder(BFLOAT16, 1), _products_adder(BFLOAT16, 2)
add_f32_u8, add_f32_u16 = _products_adder(FLOAT32, 1), _products_adder(FLOAT32, 2)


@_instruction
def no_sums(typing_context: Any) -> Any:
    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return ir.Constant(F64x8, [0.0] * EIGHT)

    return SUMS(), codegen


@_instruction
def sum_of_eight(typing_context: Any, sums: Any) -> Any:
    """The sum of the eight sums, always added in the same order."""

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
    """A tuple of eight consecutive bfloat16 values of the window, each times its weight."""
    product = builder.fmul(_eight_values(builder, BFLOAT16, values, entry), weights)
    terms = [builder.extract_element(product, ir.Constant(I32, lane)) for lane in range(EIGHT)]
    return context.make_tuple(builder, signature.return_type, terms)


@_instruction
def eight_terms(typing_context: Any, values: Any, entry: Any, weight: Any) -> Any:
    """Eight consecutive bfloat16 values of the window, all times the same weight."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        values, entry, weight = arguments
        weights = ir.Constant(F32x8, ir.Undefined)
        for lane in range(EIGHT):
            weights = builder.insert_element(weights, weight, ir.Constant(I32, lane))
        return _eight_products(context, builder, signature, values, entry, weights)

    return types.UniTuple(types.float32, EIGHT)(types.int64, types.int64, types.float32), codegen


@_instruction
def eight_terms_of_rows(typing_context: Any, values: Any, entry: Any, weights: Any) -> Any:
    """Eight consecutive bfloat16 values of the window, times the eight float32 weights at an address."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        values, entry, weights = arguments
        weights = builder.load(builder.inttoptr(weights, F32x8.as_pointer()), align=4)
        return _eight_products(context, builder, signature, values, entry, weights)

    return types.UniTuple(types.float32, EIGHT)(types.int64, types.int64, types.int64), codegen


def _looked_up(builder: ir.IRBuilder, table: ir.Value, places: ir.Value) -> ir.Value:
    """Looks up 32 bytes in a table of 16, by their lowest four bits. Gives 0 for bytes whose highest bit is set."""
    look_up = builder.module.declare_intrinsic("llvm.x86.avx2.pshuf.b", (), ir.FunctionType(BYTES, [BYTES, BYTES]))
    twice = ir.Constant(ir.VectorType(I32, 32), [*range(16), *range(16)])
    return builder.call(look_up, [builder.shuffle_vector(table, table, twice), places])


def _looked_up_in_two(builder: ir.IRBuilder, tables: Sequence[ir.Value], places: ir.Value) -> ir.Value:
    """Looks up 32 bytes in two tables of 16. Bytes whose highest bit is set are looked up in the second table."""
    flipped = builder.xor(places, ir.Constant(BYTES, [128] * 32))
    return builder.or_(_looked_up(builder, tables[0], places), _looked_up(builder, tables[1], flipped))


def _upper_and_lower(builder: ir.IRBuilder, indices: ir.Value, shift: ir.Value) -> list[ir.Value]:
    """The upper and the lower bytes of 32 indices of two bytes each: index >> shift, and index & 255.

    AVX2 packs halves of a register, so the second and the third eight of the 32 are exchanged.
    """
    words = ir.VectorType(I16, 16)
    pack = builder.module.declare_intrinsic("llvm.x86.avx2.packuswb", (), ir.FunctionType(BYTES, [words, words]))
    first = builder.inttoptr(indices, words.as_pointer())
    both = [builder.load(builder.gep(first, [ir.Constant(I64, n)]), align=2) for n in range(2)]
    shifts = builder.insert_element(ir.Constant(words, ir.Undefined), builder.trunc(shift, I16), ir.Constant(I32, 0))
    shifts = builder.shuffle_vector(shifts, shifts, ir.Constant(ir.VectorType(I32, 16), [0] * 16))
    upper = builder.call(pack, [builder.lshr(index, shifts) for index in both])
    return [upper, builder.call(pack, [builder.and_(index, ir.Constant(words, [255] * 16)) for index in both])]


def _overlap_masker(index_size: int) -> Callable[..., Any]:
    """Makes a function that returns a 64-bit mask: which of 64 positions may be in the newest row.

    On processors without AVX2 it is all of them.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        if not HAS_AVX2:
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


overlap_mask_u8, overlap_mask_u16 = _overlap_masker(1), _overlap_masker(2)
