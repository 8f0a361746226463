"""Preconditioners: from the Gram matrix S of the window to the weights w of its rows. `base.py` says what one does."""

from efcp.preconditioners.base import Preconditioner
from efcp.preconditioners.ggt import GGT
from efcp.preconditioners.mfac import MFAC

__all__ = ["GGT", "MFAC", "Preconditioner"]
