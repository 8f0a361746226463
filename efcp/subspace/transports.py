"""Transports: what becomes of Adam's moments, m and v of x = Pᵀa, when the basis moves from P₋ to P.

    NoTransport       m, v stay as they are
    LDAdamTransport   m̃ = Q m,  ṽ = (1 − β₂ᶜ) |(Q∘Q)(v̂ − m̂∘m̂) + (Q m̂)∘(Q m̂)|,  Q = PᵀP₋

after c steps, with m̂ = m / (1 − β₁ᶜ) and v̂ = v / (1 − β₂ᶜ). A transport has no state, and knows neither projectors
nor errors.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Transport(ABC):
    """Moves moments from one basis to the next. A subclass is a frozen dataclass without fields.

    Attributes:
        moves: whether moments follow the basis.
    """

    moves: ClassVar[bool] = True

    @abstractmethod
    def move(
        self, rotation: Tensor, mean: Tensor, square: Tensor, corrections: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The moments in the new basis; the arguments stay as they are.

        Args:
            rotation: Q = PᵀP₋, (r, r).
            mean: m, (r, k).
            square: v, (r, k).
            corrections: 1 − β₁ᶜ and 1 − β₂ᶜ, () each; 1 before the first step, when the moments are zero.
        """


@dataclass(frozen=True)
class NoTransport(Transport):
    """Leaves the moments as they are, numbers of the old basis in the new one (GaLore, arXiv 2403.03507)."""

    moves: ClassVar[bool] = False

    def move(
        self, rotation: Tensor, mean: Tensor, square: Tensor, corrections: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        return mean, square


@dataclass(frozen=True)
class LDAdamTransport(Transport):
    """Projects the mean, and the variance as if entries were independent (LDAdam, arXiv 2410.16103).

    The absolute value keeps second moments from turning negative. A basis that stays leaves the moments as they are, up
    to rounding.
    """

    def move(
        self, rotation: Tensor, mean: Tensor, square: Tensor, corrections: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        moved = rotation @ mean
        centre = mean / corrections[0]
        variance = square / corrections[1] - centre.square()
        return moved, corrections[1] * (rotation.square() @ variance + (rotation @ centre).square()).abs()


def require_transport(value: Any) -> None:
    """Raises TypeError unless value is a transport."""
    if not isinstance(value, Transport):
        raise TypeError(f"transport must be an instance of a subclass of efcp.subspace.Transport, got {value!r}")
