"""The operations on a CPU, compiled by Numba: one file each.

| file | what |
|---|---|
| `compress`, `dots`, `apply`, `average`, `lowbit`, `finite`, `dense`, `inverse_root`, `row_step` | an operation |
| `launch.py` | the table of parameters that kernels read, and threads |
| `convert.py`, `dtypes.py` | conversion of numbers of any dtype to and from float32 |
| `memory.py`, `bits.py` | numbers behind addresses; bits of numbers and of masks |
| `llvm.py` | instructions that Numba does not offer |
| `machine_code.py` | compiling, and the cache on disk |

The blocks of all parameters are numbered consecutively and shared out among threads. A thread works on one block at a
time, in a scratch buffer of that block's size. So memory is read and written once, and no temporary grows with a
parameter. The compiled functions read a table of addresses, sizes and dtype codes in place of arrays. A call therefore
costs microseconds, one more for each parameter, and one compilation serves many combinations of dtypes.

Results do not depend on the number of threads. `compress_` and `window_apply_` give the same bits as the definition,
unless PyTorch's square roots of float64 are rounded otherwise.
`window_dots`, `dense_dots`, `update_inverse_root_` and `mfac_row_step_` add up the same float64 terms in another, fixed
order; `row_step.py` says where the last one differs from the definition.
`norm_is_finite` and `compress_` sum the squares within a chunk or block in float32, and these sums in float64.
"""

from efcp.kernels.cpu.apply import window_apply_
from efcp.kernels.cpu.average import average_
from efcp.kernels.cpu.compress import compress_, undo_compress_
from efcp.kernels.cpu.dense import dense_dots
from efcp.kernels.cpu.dots import window_dots
from efcp.kernels.cpu.finite import norm_is_finite
from efcp.kernels.cpu.inverse_root import update_inverse_root_
from efcp.kernels.cpu.lowbit import add_lowbit_, store_lowbit_
from efcp.kernels.cpu.row_step import mfac_row_step_

__all__ = [
    "add_lowbit_",
    "average_",
    "compress_",
    "dense_dots",
    "mfac_row_step_",
    "norm_is_finite",
    "store_lowbit_",
    "undo_compress_",
    "update_inverse_root_",
    "window_apply_",
    "window_dots",
]
