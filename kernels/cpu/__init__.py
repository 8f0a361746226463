"""The operations on a CPU, compiled by Numba: one file each.

| file | what |
|---|---|
| `compress`, `dots`, `apply`, `average`, `lowbit`, `finite`, `dense`, `inverse_root` | an operation: kernels, caller |
| `launch.py` | what kernels are told of their parameters, and threads |
| `convert.py`, `dtypes.py` | numbers of any dtype, to and from float32 |
| `llvm.py` | what Numba has no words for |
| `machine_code.py` | compiling, and the cache |

The blocks of all parameters are numbered through and shared out among threads; a thread takes one block at a time and
works in a scratch of that block's size, so that memory is read and written once and no temporary grows with a
parameter. The compiled functions see a table of addresses and sizes, and dtype codes, not arrays: a call costs
microseconds, each parameter one more, and one compilation serves many combinations of dtypes.

Results do not depend on the number of threads. `compress_` and `window_apply_` give the bits of the definition;
`window_dots`, `dense_dots` and `update_inverse_root_` add up the same float64 terms in another fixed order, and
`norm_is_finite` adds up the squares of a chunk in float32, of chunks in float64.
"""

from efcp.kernels.cpu.apply import window_apply_
from efcp.kernels.cpu.average import average_
from efcp.kernels.cpu.compress import compress_
from efcp.kernels.cpu.dense import dense_dots
from efcp.kernels.cpu.dots import window_dots
from efcp.kernels.cpu.finite import norm_is_finite
from efcp.kernels.cpu.inverse_root import update_inverse_root_
from efcp.kernels.cpu.lowbit import add_lowbit_, store_lowbit_

__all__ = [
    "add_lowbit_",
    "average_",
    "compress_",
    "dense_dots",
    "norm_is_finite",
    "store_lowbit_",
    "update_inverse_root_",
    "window_apply_",
    "window_dots",
]
