"""The operations of the sparse window as Triton kernels, one file each: launch configuration, kernel, launcher.

| file | what |
|---|---|
| `gpu.py` | the GPU that tensors are on; launching a kernel there |
| `launch.py`, `tuning.py` | launching many parameters at once; choosing a configuration |
| `compress.py`, `finite.py` | `compress_`, `undo_compress_` and `norm_is_finite`, for any GPU |
| `average.py`, `lowbit.py` | `average_`, `add_lowbit_` and `store_lowbit_`, for any GPU |
| `mfac.py` | `mfac_row_step_`, for any GPU |
| `dots.py`, `apply.py` | `window_dots` and `window_apply_` in Gluon, with sums in shared memory; NVIDIA, Triton ≥ 3.7 |
| `portable.py` | these two in plain Triton, for all other GPUs and versions, and `window_dots` with momenta |

`update_inverse_root_` and `dense_dots` have no kernels, and run the definition. Steps along the newest row take
`mfac_row_step_` in place of the first, and the second is a few matrix products of PyTorch.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

if not hasattr(triton, "knobs"):
    raise ImportError(f"triton {triton.__version__} is too old: the kernels need triton 3.4, of torch 2.8, or later")

from efcp.kernels.addresses import Momenta
from efcp.kernels.blocks import SparseRows
from efcp.kernels.dispatch import KernelError, warn_of_slower
from efcp.kernels.gpus import architecture
from efcp.kernels.reference import dense_dots, update_inverse_root_
from efcp.kernels.triton import portable
from efcp.kernels.triton.average import average_
from efcp.kernels.triton.compress import compress_, undo_compress_
from efcp.kernels.triton.finite import norm_is_finite
from efcp.kernels.triton.gpu import target_of
from efcp.kernels.triton.lowbit import add_lowbit_, store_lowbit_
from efcp.kernels.triton.mfac import mfac_row_step_
from efcp.kernels.update import Update

try:
    from triton.experimental.gluon.language import shared_memory_descriptor

    HAS_GLUON = all(hasattr(shared_memory_descriptor, name) for name in ("gather", "scatter"))  # Triton 3.7 or later
except ImportError:
    HAS_GLUON = False
if HAS_GLUON:
    from efcp.kernels.triton import apply, dots

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


_broken: set[str] = set()  # operations whose kernel in Gluon does not compile here


def _shared_memory(operation: str, device: torch.device) -> int:
    """Bytes of shared memory that a program in Gluon may take; 0 where the operation's kernel cannot run."""
    if operation in _broken or triton.knobs.runtime.interpret:
        return 0
    target = target_of(device)
    return architecture(target.arch).program_shared if target.backend == "cuda" and target.arch >= 80 else 0


def _replace(operation: str, error: KernelError) -> None:
    """From now on, the portable kernel runs in place of that in Gluon. Warns once."""
    _broken.add(operation)
    warn_of_slower(f"the portable kernel of {operation} runs in place of that in Gluon", error)


def window_dots(rows: Sequence[SparseRows], slot: Tensor, momenta: Momenta = ()) -> Tensor:
    """With momenta always the portable kernel: that in Gluon does not take them."""
    values, _, blocks = rows[0]
    if HAS_GLUON and not momenta:
        shared = _shared_memory("window_dots", values.device)
        if candidates := dots.configurations(values, blocks, shared):
            try:
                return dots.window_dots(rows, slot, candidates)
            except KernelError as error:
                _replace("window_dots", error)
    return portable.window_dots(rows, slot, momenta)


def window_apply_(targets: Sequence[Tensor], momenta: Momenta, rows: Sequence[SparseRows], update: Update) -> None:
    if len(targets) != len(rows):
        raise ValueError(f"targets must hold {len(rows)} tensors, got {len(targets)}")
    values, _, blocks = rows[0]
    if HAS_GLUON:
        shared, with_squares = _shared_memory("window_apply_", values.device), update.square_weights is not None
        if candidates := apply.configurations(targets[0].dtype, values, blocks, shared, with_squares):
            try:
                return apply.window_apply_(targets, momenta, rows, update, candidates)
            except KernelError as error:
                _replace("window_apply_", error)
    portable.window_apply_(targets, momenta, rows, update)
