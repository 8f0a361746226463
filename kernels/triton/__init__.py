"""The operations of the sparse window as Triton kernels, one file each: launch configuration, kernel, launcher.

| file | what |
|---|---|
| `launch.py`, `tuning.py` | launching many parameters at once; choosing a configuration |
| `compress.py`, `finite.py` | `compress_`, `undo_compress_` and `norm_is_finite`, for any GPU |
| `average.py`, `lowbit.py` | `average_`, `add_lowbit_` and `store_lowbit_`, for any GPU |
| `mfac.py` | `mfac_row_step_`, for any GPU |
| `dots.py`, `apply.py` | `window_dots` and `window_apply_` in Gluon, with sums in shared memory; NVIDIA, Triton ≥ 3.8 |
| `portable.py` | these two in plain Triton, for all other GPUs and versions, and `window_dots` with momenta |

`update_inverse_root_` and `dense_dots` have no kernels, and run the definition. Steps along the newest row take
`mfac_row_step_` in place of the first, and the second is a few matrix products of PyTorch.
"""

from collections.abc import Sequence

import triton
from torch import Tensor

from efcp.kernels.addresses import Momenta
from efcp.kernels.blocks import SparseRows
from efcp.kernels.gpus import architecture
from efcp.kernels.reference import dense_dots, update_inverse_root_
from efcp.kernels.triton import portable
from efcp.kernels.triton.average import average_
from efcp.kernels.triton.compress import compress_, undo_compress_
from efcp.kernels.triton.finite import norm_is_finite
from efcp.kernels.triton.lowbit import add_lowbit_, store_lowbit_
from efcp.kernels.triton.mfac import mfac_row_step_
from efcp.kernels.update import Update

try:
    from efcp.kernels.triton import apply, dots

    HAS_GLUON = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8)
except ImportError:  # a version of Triton without Gluon
    HAS_GLUON = False

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


def _shared_memory() -> int:
    """Bytes of shared memory that a Gluon program may take on the current GPU; 0 where Gluon kernels cannot run."""
    if not HAS_GLUON or triton.knobs.runtime.interpret:
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return architecture(target.arch).program_shared if target.backend == "cuda" and target.arch >= 80 else 0


def window_dots(rows: Sequence[SparseRows], slot: Tensor, momenta: Momenta = ()) -> Tensor:
    """With momenta always the portable kernel: that in Gluon does not take them."""
    values, _, blocks = rows[0]
    if momenta:
        return portable.window_dots(rows, slot, momenta)
    if HAS_GLUON and (candidates := dots.configurations(values, blocks, _shared_memory())):
        return dots.window_dots(rows, slot, candidates)
    return portable.window_dots(rows, slot)


def window_apply_(targets: Sequence[Tensor], momenta: Momenta, rows: Sequence[SparseRows], update: Update) -> None:
    if len(targets) != len(rows):
        raise ValueError(f"targets must hold {len(rows)} tensors, got {len(targets)}")
    values, _, blocks = rows[0]
    if HAS_GLUON:
        window, with_squares = (targets[0].dtype, values, blocks), update.square_weights is not None
        if candidates := apply.configurations(*window, _shared_memory(), with_squares):
            apply.window_apply_(targets, momenta, rows, update, candidates)
            return
    portable.window_apply_(targets, momenta, rows, update)
