"""Preconditioners: from the Gram matrix S of the window to the weights w of its rows. `base.py` says what one does."""

from efcp.preconditioners.adam import AdamStats
from efcp.preconditioners.base import LocalPreconditioner, Preconditioner
from efcp.preconditioners.ggt import GGT
from efcp.preconditioners.kronecker import Kronecker
from efcp.preconditioners.mfac import MFAC

__all__ = ["GGT", "MFAC", "AdamStats", "Kronecker", "LocalPreconditioner", "Preconditioner"]
