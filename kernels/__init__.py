"""The operations of the sparse window: one definition each, faster versions, and the choice between them.

| file | what |
|---|---|
| `blocks.py` | the layout: blocks, rows, padding |
| `reference.py` | the definition, in PyTorch |
| `triton_ops/` | Triton kernels, for GPUs |
| `cpu.py` | compiled by Numba, for CPUs |
| `operators.py` | the operations as nodes of a compiled graph |

A backend is a module with the three operations. On a GPU it is `triton`, on a CPU `cpu`, where Triton or Numba can be
imported; else it is `reference`. The environment variable `EFCP_KERNELS`, or `use_backend`, forces one.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from efcp.kernels import operators
from efcp.kernels.blocks import MAX_BLOCK_SIZE, Blocks
from efcp.kernels.reference import accumulation_dtype

__all__ = [
    "BACKENDS",
    "MAX_BLOCK_SIZE",
    "Blocks",
    "accumulation_dtype",
    "backend_name",
    "compress_",
    "use_backend",
    "window_apply_",
    "window_dots",
]

BACKENDS = {
    "reference": "efcp.kernels.reference",
    "triton": "efcp.kernels.triton_ops",
    "cpu": "efcp.kernels.cpu",
}
FASTEST = {"cpu": "cpu", "cuda": "triton", "xpu": "triton"}  # by type of device

_forced: str | None = None


def _checked(name: str | None, source: str) -> str | None:
    if name not in (None, *BACKENDS):
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the context, run the operations of a backend on every device.

    Args:
        name: "reference", "triton", "cpu" or None, which leaves the choice to the device. It goes before the variable
            `EFCP_KERNELS`.

    Raises:
        ValueError: for another name.
    """
    global _forced
    before, _forced = _forced, _checked(name, "name")
    try:
        yield
    finally:
        _forced = before


@cache
def _can_import(name: str) -> bool:
    """Whether what a backend is made with is installed, and works."""
    try:
        importlib.import_module(BACKENDS[name])
    except ImportError:
        return False
    return True


def backend_name(device: torch.device) -> str:
    """The backend for tensors on a device.

    Raises:
        ValueError: if the environment variable `EFCP_KERNELS` names none.
    """
    forced = _forced or _checked(os.environ.get("EFCP_KERNELS") or None, "EFCP_KERNELS")
    if forced is not None:
        return forced
    fastest = FASTEST.get(device.type, "reference")
    return fastest if _can_import(fastest) else "reference"


def _backend(tensor: Tensor) -> ModuleType:
    return importlib.import_module(BACKENDS[backend_name(tensor.device)])


def _layout(blocks: Blocks) -> tuple[int, int, float]:
    return blocks.numel, blocks.block_size, blocks.density


def compress_(
    grad: Tensor,
    error: Tensor | None,
    values: Tensor,
    indices: Tensor,
    slot: Tensor,
    finite: Tensor,
    blocks: Blocks,
) -> None:
    """Blockwise Top-k with error feedback: a = e + g, the newest row c = Top-k(a), e = a − c.

    Of each block the k elements of largest magnitude are kept; of equal ones those at lower positions. The row is
    written to the window rounded to its dtype, and the error keeps what the rounding leaves. Where `finite` is false,
    the row is zero and the error stays as it was. (EFCP, arXiv 2306.06098, algorithm 1.)

    Args:
        grad: (n,) contiguous, floating point; never changed.
        error: (n,) contiguous, floating point, updated in place; None for no error feedback, that is a = g.
        values: (blocks, m, k) bfloat16 or float32; row `slot` is overwritten.
        indices: (blocks, m, k) of dtype `blocks.index_dtype`; row `slot` is overwritten.
        slot: (1,) int64, the row to write, on the device of the others.
        finite: () bool, on the device of the others.
        blocks: the layout of the parameter.
    """
    if torch.compiler.is_compiling():
        operators.compress_(grad, error, values, indices, slot, finite, *_layout(blocks))
    else:
        _backend(grad).compress_(grad, error, values, indices, slot, finite, blocks)


def window_dots(values: Tensor, indices: Tensor, slot: Tensor, blocks: Blocks) -> Tensor:
    """Inner products of every row of the window with row `slot`: one row of the Gram matrix S = G Gᵀ.

    Args:
        values, indices: the window, (blocks, m, k).
        slot: (1,) int64, on the window's device.
        blocks: the layout of the parameter.

    Returns:
        (m,) float64.
    """
    if torch.compiler.is_compiling():
        return operators.window_dots(values, indices, slot, *_layout(blocks))
    return _backend(values).window_dots(values, indices, slot, blocks)


def window_apply_(
    target: Tensor, values: Tensor, indices: Tensor, weights: Tensor, scale: Tensor, blocks: Blocks
) -> None:
    """target ← scale · target + Σᵢ weightsᵢ · Gᵢ, with the rows Gᵢ of the window.

    Args:
        target: (n,) contiguous, floating point, updated in place. Arithmetic is in float32 (float64 for a float64
            target), rounded once at the end.
        values, indices: the window, (blocks, m, k).
        weights: (m,) floating point, on the target's device.
        scale: () floating point, on the target's device.
        blocks: the layout of the parameter.
    """
    if torch.compiler.is_compiling():
        operators.window_apply_(target, values, indices, weights, scale, *_layout(blocks))
    else:
        _backend(target).window_apply_(target, values, indices, weights, scale, blocks)
