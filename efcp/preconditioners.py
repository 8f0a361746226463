"""Preconditioners: from the Gram matrix S of the window to the weights w of its rows.

The update is u = Gᵀ f(S) e_t, where e_t picks the newest row. All work is on m × m matrices in float64, whatever the
model's size. A new preconditioner is a class in this file.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from efcp.checks import is_number, require, require_number
from efcp.gram import Gram


@dataclass(frozen=True)
class Preconditioner(ABC):
    """Options of a preconditioner. They become options of the param groups, all of which must agree on them."""

    @property
    def options(self) -> dict[str, Any]:
        return asdict(self)

    @abstractmethod
    def allocate(self, window: int, device: torch.device) -> dict[str, Any]:
        """New state, for a window of zero rows: what it derives from the Gram matrix and keeps beside it."""

    @abstractmethod
    def weights(self, gram: Gram, slot: Tensor) -> Tensor:
        """The weights w = f(S) e_t.

        Args:
            gram: the Gram matrix. Since the last call its row and column `slot` have changed, and nothing else.
            slot: (1,) int64, the newest row.

        Returns:
            (m,) float64.
        """


@dataclass(frozen=True)
class MFAC(Preconditioner):
    """M-FAC: f(S) = (λI + S/m)⁻¹, so that u = (λI + GᵀG/m)⁻¹c for the newest row c (arXiv 2107.03356; 2306.06098).

    A square root R of the inverse is kept, RᵀR = (mλI + S)⁻¹, and follows each replaced row in O(m²). It is computed
    anew once in m steps and whenever the damping changes. One step of iterative refinement removes from the weights
    what the updates have gathered in rounding errors meanwhile.

    Where squared norms of gradients exceed 10¹⁰ λ and rows of the window depend on each other, float64 cannot solve the
    system. Weights that miss it by 10% or more are replaced by those for a window of the newest row alone.

    Args:
        damping: λ > 0.

    Raises:
        ValueError: for other values.
    """

    damping: float = 1e-4

    def __post_init__(self) -> None:
        require_number("damping", self.damping, 0, open_low=True)

    def allocate(self, window: int, device: torch.device) -> dict[str, Any]:
        root = torch.eye(window, dtype=torch.float64, device=device) * (window * self.damping) ** -0.5
        return {"inverse_root": root, "inverse_age": 0, "inverse_damping": float(self.damping)}

    def weights(self, gram: Gram, slot: Tensor) -> Tensor:
        S, R, state = gram.matrix, gram.state["inverse_root"], gram.state
        window = len(S)
        ridge = window * self.damping
        update_inverse_root_(R, S, slot, ridge)
        if state["inverse_age"] >= window or state["inverse_damping"] != self.damping:
            invert_(R, S, ridge)
            state["inverse_age"], state["inverse_damping"] = 0, float(self.damping)
        state["inverse_age"] += 1

        target = torch.zeros_like(S[0]).index_fill_(0, slot, window)
        weights = R.t() @ (R @ target)
        weights += R.t() @ (R @ (target - S @ weights - ridge * weights))
        solved = torch.linalg.vector_norm(target - S @ weights - ridge * weights) < 0.1 * window
        diagonal = S.diagonal() + ridge
        R.copy_(torch.where(solved, R, torch.diag(diagonal.rsqrt())))
        return torch.where(solved, weights, target / diagonal)


def update_inverse_root_(R: Tensor, S: Tensor, slot: Tensor, ridge: float) -> None:
    """Makes R, RᵀR = (ridge · I + S)⁻¹, follow a change of row and column `slot` of S, in O(m²).

    With t the slot: a Householder reflection of R from the left, which leaves RᵀR as it is, moves all of column t to
    row t. Without that row and column, RᵀR is the inverse of the matrix without its row and column t. The new column s,
    s_t on the diagonal, then adds the row (−sᵀRᵀR, 1 at t) / √σ with σ = ridge + s_t − ‖Rs‖², the Schur complement,
    which is at least the ridge.

    This is a square-root filter. Updates of the inverse itself lose twice as many digits: on windows of dependent rows
    its error grows without bound where squared norms of gradients are 10⁸ λ.

    Args:
        R: (m, m) float64, changed in place.
        S: (m, m) float64, already with its new row and column.
        slot: (1,) int64.
        ridge: mλ.
    """
    v = R.index_select(1, slot).squeeze(1)
    at_slot = v.index_select(0, slot)
    norm = torch.linalg.vector_norm(v)
    v.index_add_(0, slot, torch.copysign(norm, at_slot))  # v reflects column t to a multiple of e_t
    R.addr_(v, (R.t() @ v) * (-2 / torch.dot(v, v)))
    R.index_fill_(0, slot, 0.0).index_fill_(1, slot, 0.0)

    column = S.index_select(0, slot).squeeze(0)
    diagonal = column.index_select(0, slot)
    column.index_fill_(0, slot, 0.0)
    projected = R @ column
    schur = (ridge + diagonal - torch.dot(projected, projected)).clamp(min=ridge)
    row = (-(R.t() @ projected)).index_fill_(0, slot, 1.0)
    R.index_copy_(0, slot, (row * schur.rsqrt()).unsqueeze(0))


def invert_(R: Tensor, S: Tensor, ridge: float) -> None:
    """RᵀR ← (ridge · I + S)⁻¹ by Cholesky; R stays where rounding has left that matrix not positive definite."""
    A = S.clone()
    A.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(A)
    root = torch.linalg.solve_triangular(factor, torch.eye(len(S), dtype=S.dtype, device=S.device), upper=False)
    R.copy_(torch.where(failed == 0, root, R))


@dataclass(frozen=True)
class GGT(Preconditioner):
    """Full-matrix Adagrad over a window: f(S) = (S^½ + εI)⁻¹, u = [(GᵀG)^½ + εI]⁻¹c (arXiv 1806.02958; 2306.06098).

    With a decay β₂, the rows of the window count β₂^age each: f(S) = D (√(DSD) + εI)⁻¹ D, D = diag(β₂^age).

    The eigendecomposition of an m × m matrix each step makes a GPU wait for the host once (`torch.linalg.eigh` checks
    its own success).

    Args:
        eps: ε > 0.
        beta2: β₂ in (0, 1].

    Raises:
        ValueError: for other values.
    """

    eps: float = 1e-5
    beta2: float = 1.0

    def __post_init__(self) -> None:
        require_number("eps", self.eps, 0, open_low=True)
        require(is_number(self.beta2) and 0 < self.beta2 <= 1, "beta2", "lie in (0, 1]", self.beta2)

    def allocate(self, window: int, device: torch.device) -> dict[str, Any]:
        return {}

    def weights(self, gram: Gram, slot: Tensor) -> Tensor:
        S = gram.matrix
        age = (slot - torch.arange(len(S), device=S.device)) % len(S)
        decay = self.beta2 ** age.double()
        eigenvalues, Q = torch.linalg.eigh(decay[:, None] * S * decay)
        root = eigenvalues.clamp(min=0).sqrt()
        return decay * (Q @ (Q.index_select(0, slot).squeeze(0) / (root + self.eps)))
