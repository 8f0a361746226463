"""The directions that a step can precondition: the newest row, an average of the rows held, or a dense momentum.

| direction | preconditioned | the update u | takes |
|---|---|---|---|
| "row" | the newest row c of the window, as in the papers | Gᵀ f(S) e_t | nothing |
| "average" | Σ αᵢGᵢ, αᵢ ∝ β^age over the rows held, Σα = 1: a momentum of the rows | Gᵀ f(S) α | nothing |
| "momentum" | a ← βa + (1 − β)g: the metric is compressed, the direction is not | γa + Gᵀw | a buffer |

with β the option `momentum`. With "row" that is heavy ball on the update instead.

The length of u needs no vector of the parameters' size: ‖u‖² = γ²‖a‖² + 2γ wᵀb + wᵀSw with b = Ga. Nor does its product
with the newest row, ⟨c, u⟩ = γ b_t + (Sw)_t.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from efcp.gram import Gram
from efcp.preconditioners import Preconditioner

DIRECTIONS = ("row", "average", "momentum")


class Combination(NamedTuple):
    """An update u = factor · a + Gᵀ weights, in float64; without a dense vector a, the factor is 0."""

    weights: Tensor  # (m,); all others ()
    factor: Tensor
    squared_norm: Tensor  # ‖u‖²
    inner: Tensor  # ⟨c, u⟩ with the newest row c

    def scaled(self, by: Tensor) -> "Combination":
        """The update times a number, () float64."""
        return Combination(self.weights * by, self.factor * by, self.squared_norm * by * by, self.inner * by)

    def where(self, finite: Tensor) -> "Combination":
        """The update, or none where not finite, () bool."""
        return Combination(*(torch.where(finite, value, 0.0) for value in self))


def row_update(preconditioner: Preconditioner, gram: Gram, slot: Tensor) -> Combination:
    """The update along the newest row."""
    return _of_rows(gram, slot, preconditioner.weights(gram, slot))


def average_update(preconditioner: Preconditioner, gram: Gram, slot: Tensor, beta: float) -> Combination:
    """The update along the average of the rows held."""
    age = gram.ages(slot)
    average = torch.where(age < gram.state["step"], beta ** age.double(), 0.0)
    return _of_rows(gram, slot, preconditioner.weights_of_rows(gram, slot, average / average.sum()))


def momentum_update(
    preconditioner: Preconditioner, gram: Gram, slot: Tensor, products: Tensor, square: Tensor
) -> Combination:
    """The update along a dense vector a.

    Args:
        products: b = Ga, (m,) float64.
        square: ‖a‖², () float64.
    """
    factor, weights = preconditioner.weights_of_vector(gram, slot, products, square)
    of_rows = _of_rows(gram, slot, weights)
    cross = 2 * factor * torch.dot(weights, products)
    squared_norm = (factor * factor * square + cross + torch.dot(weights, gram.matrix @ weights)).clamp(min=0)
    inner = of_rows.inner + factor * products.index_select(0, slot).squeeze(0)
    return Combination(weights, factor, squared_norm, inner)


def local_update(gram: Gram, length: float) -> Combination:
    """The combination to record for updates of each parameter by itself: of them the length alone is known."""
    zero = torch.zeros_like(gram.state["factor"])
    return Combination(torch.zeros_like(gram.state["weights"]), zero, torch.full_like(zero, length**2), zero)


def _of_rows(gram: Gram, slot: Tensor, weights: Tensor) -> Combination:
    product = gram.matrix @ weights
    return Combination(
        weights,
        weights.new_zeros(()),
        torch.dot(weights, product).clamp(min=0),
        product.index_select(0, slot).squeeze(0),
    )
