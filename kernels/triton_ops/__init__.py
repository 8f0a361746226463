"""The operations of the sparse window as Triton kernels, one file each: launch configuration, kernel, launcher."""

from efcp.kernels.triton_ops.apply import window_apply_
from efcp.kernels.triton_ops.compress import compress_
from efcp.kernels.triton_ops.dots import window_dots

__all__ = ["compress_", "window_apply_", "window_dots"]
