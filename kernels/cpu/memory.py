"""Reading and writing numbers behind addresses, in plain Numba.

`load_*(address, index)` is number `index` of those stored from `address` on, and `store_*` writes it. Loaded integers
are uint64, or int64 for `load_i64`. Indices must not be negative: unlike those of arrays, they do not wrap around.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray

from efcp.kernels.cpu.llvm import pointer
from efcp.kernels.cpu.machine_code import jit

SIZE = 1 << 40  # elements of an array that begins at the address; no index is as large


def _named(function: Callable[..., Any], dtype: type) -> Callable[..., Any]:
    """Compiles a function under a name of its own: two symbols of one name could end up with each other's code."""
    function.__qualname__ = f"{function.__name__}_{dtype.__name__}"
    return jit(function)


def _loader(stored: type, result: type) -> Callable[[int, int], Any]:
    def load(address: int, index: int) -> Any:
        return result(carray(pointer(address), SIZE, stored)[np.uint64(index)])

    return _named(load, stored)


def _storer(stored: type) -> Callable[[int, int, Any], None]:
    def store(address: int, index: int, value: Any) -> None:
        carray(pointer(address), SIZE, stored)[np.uint64(index)] = value

    return _named(store, stored)


load_u8, store_u8 = _loader(np.uint8, np.uint64), _storer(np.uint8)
load_u16, store_u16 = _loader(np.uint16, np.uint64), _storer(np.uint16)
load_i64, store_i64 = _loader(np.int64, np.int64), _storer(np.int64)
load_f32, store_f32 = _loader(np.float32, np.float32), _storer(np.float32)
load_f64, store_f64 = _loader(np.float64, np.float64), _storer(np.float64)
