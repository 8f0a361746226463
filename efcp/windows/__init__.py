"""Windows: what is kept of the last m gradients of a parameter. `base.py` says what a window does."""

from efcp.windows.base import Compressor, Separate, SingleWindow, Window
from efcp.windows.dense import Identity
from efcp.windows.lowrank import LowRank
from efcp.windows.sparse import TopK

__all__ = ["Compressor", "Identity", "LowRank", "Separate", "SingleWindow", "TopK", "Window"]
