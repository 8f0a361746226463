"""Full-matrix second-order optimizers whose gradient window is compressed with error feedback (arXiv 2306.06098)."""

from pathlib import Path

# In a clone the folders kernels/, perf/ and analysis/ stand beside efcp/; installed, they are inside it.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

from efcp.groups import param_groups
from efcp.memory import MemoryReport, estimate_memory, memory_report
from efcp.optimizer import EFCP
from efcp.preconditioners import GGT, MFAC, AdamStats, Kronecker, LocalPreconditioner, Preconditioner
from efcp.ready_made import (
    MFACW,
    DenseGGT,
    DenseMFAC,
    KroneckerW,
    LowRankGGT,
    LowRankMFAC,
    MicroAdam,
    SparseGGT,
    SparseMFAC,
)
from efcp.subspace import (
    DCT,
    SVD,
    AdaRankGrad,
    GaLoreAdamW,
    LDAdamError,
    LDAdamTransport,
    LDAdamW,
    NoError,
    NoTransport,
    PlainError,
    PowerIteration,
    RandomizedSVD,
    SubspaceAdam,
)
from efcp.windows import Compressor, Identity, LowRank, Separate, SingleWindow, TopK, Window

__version__ = "0.1.0"

__all__ = [
    "DCT",
    "EFCP",
    "GGT",
    "MFAC",
    "MFACW",
    "SVD",
    "AdaRankGrad",
    "AdamStats",
    "Compressor",
    "DenseGGT",
    "DenseMFAC",
    "GaLoreAdamW",
    "Identity",
    "Kronecker",
    "KroneckerW",
    "LDAdamError",
    "LDAdamTransport",
    "LDAdamW",
    "LocalPreconditioner",
    "LowRank",
    "LowRankGGT",
    "LowRankMFAC",
    "MemoryReport",
    "MicroAdam",
    "NoError",
    "NoTransport",
    "PlainError",
    "PowerIteration",
    "Preconditioner",
    "RandomizedSVD",
    "Separate",
    "SingleWindow",
    "SparseGGT",
    "SparseMFAC",
    "SubspaceAdam",
    "TopK",
    "Window",
    "estimate_memory",
    "memory_report",
    "param_groups",
]
