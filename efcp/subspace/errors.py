"""Errors: what of a gradient and of the moments does not fit into the subspace, and is added to the next gradient.

A step sees a = g + e in place of the gradient g. With x = Pᵀa, and moments m that have become m̃ on the way from the
basis P₋ to P:

    NoError       e = 0, and nothing is kept
    PlainError    e ← a − Px
    LDAdamError   e ← (a − Px) + β₁/(1 − β₁) · (P₋m − Pm̃)

State of a matrix, but for NoError, all zero until the first step:

    error  (n, k)  float32, or float64 for float64 parameters   of a matrix turned so that its shorter side comes first

An error knows neither projectors nor transports. Where a basis stays for several steps, Pᵀe = 0 until it moves: the
error would only grow, and the steps would not see it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor


@dataclass(frozen=True)
class ErrorFeedback(ABC):
    """Says what is kept for the next step. A subclass is a frozen dataclass without fields.

    Attributes:
        keeps: whether anything is kept.
        needs_transport: whether the method has no meaning with moments that stay behind when the basis moves.
    """

    keeps: ClassVar[bool] = True
    needs_transport: ClassVar[bool] = False

    @abstractmethod
    def left(
        self, a: Tensor, kept: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], beta1: float
    ) -> Tensor:
        """The error e that the next step adds to its gradient: (n, k).

        Args:
            a: (n, k), which stays as it is.
            kept: Px, (n, k).
            old: P₋, (n, r), and m, (r, k), before they moved.
            new: P and m̃, before m̃ takes in x.
            beta1: β₁ in [0, 1).
        """


@dataclass(frozen=True)
class NoError(ErrorFeedback):
    """Drops what does not fit into the subspace, as GaLore (arXiv 2403.03507) does."""

    keeps: ClassVar[bool] = False

    def left(
        self, a: Tensor, kept: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], beta1: float
    ) -> Tensor:
        raise NotImplementedError("nothing is kept")


@dataclass(frozen=True)
class PlainError(ErrorFeedback):
    """Keeps what of the gradient does not fit into the subspace: Px + e is what came in, g and the error before."""

    def left(
        self, a: Tensor, kept: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], beta1: float
    ) -> Tensor:
        return a - kept


@dataclass(frozen=True)
class LDAdamError(ErrorFeedback):
    """Also keeps what moments lose as the basis moves (LDAdam, arXiv 2410.16103: generalised error feedback).

    The mean m enters all steps to come with the weights β₁, β₁², …, a gradient enters its own with 1 − β₁: hence the
    factor β₁/(1 − β₁).
    """

    needs_transport: ClassVar[bool] = True

    def left(
        self, a: Tensor, kept: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], beta1: float
    ) -> Tensor:
        lost = old[0] @ old[1] - new[0] @ new[1]
        return a - kept + beta1 / (1 - beta1) * lost


def require_error(value: Any) -> None:
    """Raises TypeError unless value is an error."""
    if not isinstance(value, ErrorFeedback):
        raise TypeError(f"error must be an instance of a subclass of efcp.subspace.ErrorFeedback, got {value!r}")
