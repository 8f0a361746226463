"""Adam in subspaces of gradient matrices. `optimizer.py` says how a step goes, the other files what its parts do."""

from efcp.subspace.errors import ErrorFeedback, LDAdamError, NoError, PlainError
from efcp.subspace.optimizer import SubspaceAdam
from efcp.subspace.projectors import DCT, SVD, PowerIteration, Projector, RandomizedSVD
from efcp.subspace.ready_made import AdaRankGrad, GaLoreAdamW, LDAdamW
from efcp.subspace.transports import LDAdamTransport, NoTransport, Transport

__all__ = [
    "DCT",
    "SVD",
    "AdaRankGrad",
    "ErrorFeedback",
    "GaLoreAdamW",
    "LDAdamError",
    "LDAdamTransport",
    "LDAdamW",
    "NoError",
    "NoTransport",
    "PlainError",
    "PowerIteration",
    "Projector",
    "RandomizedSVD",
    "SubspaceAdam",
    "Transport",
]
