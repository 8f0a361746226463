"""The Triton kernels in Triton's interpreter, against the definition. Run by test_triton.py, in a process of its own.

The interpreter executes the language itself, without a compiler, so it tells a mistake in a kernel from one in Triton.
It is slow: tiny shapes, and but one case of each kind unless its argument is "all".
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import numpy as np
import torch
from triton import language as tl
from triton.runtime import interpreter

from efcp.kernels import triton as triton_ops
from tests.kernels.kernel_cases import (
    BFLOAT16,
    BITS4,
    BITS8,
    FLOAT32,
    FLOAT64,
    Case,
    check_apply,
    check_average,
    check_compress,
    check_dots,
    check_lowbit,
    check_norm_is_finite,
    check_undo,
)
from tests.kernels.row_steps import check_row_steps

CASES = [
    Case(1, 4096, 0.01, values=FLOAT32),
    Case(63, 7, 0.37, kind="ties", grad=BFLOAT16, values=FLOAT32),
    Case(100, 64, 0.07, error=None, values=FLOAT32, finite=False),
    Case(100, 300, 0.1, grad=FLOAT64, error=FLOAT32, values=FLOAT32, slot=2),
    Case(63, 16, 1.0, error=BFLOAT16, slot=0),
]
FEW_BITS = [
    Case(300, 200, 0.1, error=BITS8, values=FLOAT32),
    Case(100, 15, 0.3, error=BITS4, values=FLOAT32, kind="ties"),
    Case(256, 256, 0.1, error=BITS4),
    Case(100, 64, 0.07, grad=BFLOAT16, error=BITS8, finite=False),
]


def float64_arguments(convert):
    """A Python float of a launch is a float64, as the kernels say, and not a number without a dtype."""

    def converted(argument):
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument]), tl.float64), tl.float64)
        return convert(argument)

    return converted


def round_to_bfloat16(convert):
    """Where a GPU rounds a float32 to the nearest bfloat16, ties to even, the interpreter cuts its lower half off."""

    def converted(data, source, destination, rounding):
        if source == tl.float32 and destination == tl.bfloat16:
            return torch.from_numpy(np.array(data)).to(BFLOAT16).view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, destination, rounding)

    return converted


def splat_booleans(splat):
    """Where a comparison of scalars is spread out, the interpreter makes int32 of it: no mask for Triton 3.9."""

    def spread(builder, shape, scalar):
        result = splat(builder, shape, scalar)
        if scalar.data.dtype == bool:
            result.data = result.data.astype(bool)
        return result

    return spread


if __name__ == "__main__":
    interpreter.InterpreterBuilder.create_splat = splat_booleans(interpreter.InterpreterBuilder.create_splat)
    interpreter._convert_float = round_to_bfloat16(interpreter._convert_float)
    interpreter._implicit_cvt = float64_arguments(interpreter._implicit_cvt)
    last = None if sys.argv[1] == "all" else 1
    for case in CASES[:last]:
        print(case)
        check_norm_is_finite(triton_ops.norm_is_finite, case)
        check_compress(triton_ops.compress_, case)
        check_undo(triton_ops.undo_compress_, case)
        check_average(triton_ops.average_, case)
        check_lowbit((triton_ops.store_lowbit_, triton_ops.add_lowbit_), case)
        check_dots(triton_ops.window_dots, case)
        check_apply(triton_ops.window_apply_, case)
    for case in FEW_BITS[:last]:
        print(case)
        check_compress(triton_ops.compress_, case)
        check_undo(triton_ops.undo_compress_, case)
    for name in ("both", "one row")[:last]:
        print(name)
        check_row_steps(triton_ops.mfac_row_step_, name)
