"""Full-matrix Adagrad (GGT): weights from (√S + εI)⁻¹, by an eigendecomposition each step or more seldom."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efcp.checks import is_number, require, require_integer, require_number
from efcp.gram import Gram
from efcp.preconditioners.base import Preconditioner


@dataclass(frozen=True)
class GGT(Preconditioner):
    """Full-matrix Adagrad over a window: f(S) = (√S + εI)⁻¹, u = [√(GᵀG) + εI]⁻¹c (arXiv 1806.02958; 2306.06098).

    With a decay β₂, the rows of the window count β₂^age each: f(S) = D (√(DSD) + εI)⁻¹ D, D = diag(β₂^age).

    Updates are at most 1 long. Rounding would break that, so DSD + φI replaces DSD, with φ a share of its trace (see
    `floor`): 4e-13 where all parameters are float64, else 6e-8. That damps directions whose singular values are below
    7e-7, or 2.4e-4, of the root of the trace.

    An eigendecomposition of an m × m matrix each step is slow for large m, and makes a GPU wait for the host once
    (`torch.linalg.eigh` checks its own success). With `refresh_every` n > 1 only every n-th step does one, of the m − n
    rows that these n steps will not replace. The weights are the same up to rounding: the n other rows, the newest
    among them, enter exactly (`weights_with_border`), in O(m² + m n²). This pays for windows of some hundreds of rows
    and more; it takes 8 (m − n)² bytes of state.

    Args:
        eps: ε > 0; where `relative`, times the root of the mean squared length of the rows.
        beta2: β₂ in (0, 1].
        refresh_every: n ≥ 1, steps from one eigendecomposition to the next; fixed from the first step on, where
            later changes have no effect. More than 1 only for the direction "row".
        relative: whether ε is relative to the gradients.

    Raises:
        ValueError: for other values.
    """

    eps: float = 1e-5
    beta2: float = 1.0
    refresh_every: int = 1
    relative: bool = False

    fixed = ("refresh_every",)

    def __post_init__(self) -> None:
        require_number("eps", self.eps, 0, open_low=True)
        require(is_number(self.beta2) and 0 < self.beta2 <= 1, "beta2", "lie in (0, 1]", self.beta2)
        require_integer("refresh_every", self.refresh_every, 1)
        require(isinstance(self.relative, bool), "relative", "be True or False", self.relative)

    def allocate(self, window_size: int, device: torch.device) -> dict[str, Any]:
        if self.refresh_every == 1:
            return {}
        kept = window_size - min(self.refresh_every, window_size)  # no row is there yet: the matrix is zero
        return {
            "eigenvalues": torch.zeros(kept, dtype=torch.float64, device=device),
            "eigenvectors": torch.eye(kept, dtype=torch.float64, device=device),
            "eigen_age": 0,
            "eigen_beta2": float(self.beta2),
        }

    def weights(self, gram: Gram, slot: Tensor) -> Tensor:
        decay = self._decay(gram, slot)
        if "eigenvalues" in gram.state:
            return decay * self._bordered_weights(gram, decay, slot)
        root, Q, _ = self._decomposed(gram, decay)
        return decay * (Q @ (Q.index_select(0, slot).squeeze(0) / (root + self._eps(gram))))

    def weights_of_rows(self, gram: Gram, slot: Tensor, combination: Tensor) -> Tensor:
        decay = self._decay(gram, slot)
        root, Q, _ = self._decomposed(gram, decay)
        return decay * (Q @ ((Q.t() @ (decay * combination)) / (root + self._eps(gram))))

    def weights_of_vector(self, gram: Gram, slot: Tensor, products: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """As `Preconditioner` says, for the metric [(GᵀD²G + φI)^½ + εI]⁻¹, of which φ is what `floor` gives.

        With p = √φ + ε and q = √(s + φ) + ε for an eigenvalue s, γ = 1/p and (1/q − 1/p)/s = −1/(p q (√(s + φ) + √φ)).
        """
        decay, eps = self._decay(gram, slot), self._eps(gram)
        root, Q, lowest = self._decomposed(gram, decay)
        p, q = lowest + eps, root + eps
        weights = torch.where(root > 0, (Q.t() @ (decay * products)) / (p * q * (root + lowest)), 0.0)
        return 1 / p, -decay * (Q @ weights)

    def check_direction(self, direction: str) -> None:
        super().check_direction(direction)
        if direction != "row":
            require(self.refresh_every == 1, "refresh_every", f"be 1 with direction {direction!r}", self.refresh_every)

    def _decay(self, gram: Gram, slot: Tensor) -> Tensor:
        """The diagonal of D, (m,) float64."""
        age = (slot - torch.arange(len(gram.matrix), device=slot.device)) % len(gram.matrix)
        return self.beta2 ** age.double()

    def _eps(self, gram: Gram) -> Tensor:
        """ε, () float64."""
        one = torch.ones((), dtype=torch.float64, device=gram.matrix.device)
        return self.eps * (gram.mean_square().sqrt() if self.relative else one)

    def _decomposed(self, gram: Gram, decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The roots of the eigenvalues of DSD + φI, (m,), the eigenvectors, and √φ, with φ what `floor` gives."""
        eigenvalues, Q = torch.linalg.eigh(decay[:, None] * gram.matrix * decay)
        lowest = floor(eigenvalues.sum(), gram.rounding)
        return (eigenvalues.clamp(min=0) + lowest).sqrt(), Q, lowest.sqrt()

    def _bordered_weights(self, gram: Gram, decay: Tensor, slot: Tensor) -> Tensor:
        """(√A + εI)⁻¹ e_t, A = DSD, from the eigendecomposition of the rows that stay the same for n steps."""
        S, state = gram.matrix, gram.state
        window_size, kept = len(S), len(state["eigenvalues"])
        refresh = state["eigen_age"] >= window_size - kept or state["eigen_beta2"] != self.beta2
        age = 0 if refresh else state["eigen_age"]
        order = (slot - age - kept + torch.arange(window_size, device=S.device)) % window_size  # kept, then replaced

        def columns(some: Tensor) -> Tensor:
            """Columns of A, their rows in order."""
            chosen = S.index_select(1, some).index_select(0, order)
            return decay.index_select(0, order)[:, None] * chosen * decay.index_select(0, some)

        if refresh:
            eigenvalues, eigenvectors = torch.linalg.eigh(columns(order[:kept])[:kept])
            state["eigenvalues"].copy_(eigenvalues)
            state["eigenvectors"].copy_(eigenvectors)
        state["eigen_age"], state["eigen_beta2"] = age + 1, float(self.beta2)
        eigenvalues = state["eigenvalues"] * self.beta2 ** (2 * age)  # the rows have decayed since, all alike
        border = columns(order[kept:])
        weights = weights_with_border(
            eigenvalues, state["eigenvectors"], border, kept + age, self._eps(gram), gram.rounding
        )
        return torch.zeros_like(weights).index_copy_(0, order, weights)

    def refresh(self, gram: Gram) -> None:
        if "eigen_age" in gram.state:
            gram.state["eigen_age"] = len(gram.matrix)  # the next step decomposes


TOLERATED = 5e-4  # of the length of an update, by which rounding may change it


def floor(trace: Tensor, rounding: float) -> Tensor:
    """The number to add to all eigenvalues of A = (DG)(DG)ᵀ, so that rounding does not make updates longer than 1.

    In exact arithmetic ‖u‖ ≤ 1. Weights of an eigenvector with eigenvalue x are at most 1/√(x + floor) long. Rounding
    of A, ε₆₄ trace(A), then changes ‖u‖² = wᵀAw by ε₆₄ trace/floor; and rounding of the weighted rows that are summed,
    to their own ε, changes u by ε √(trace/floor).

    Args:
        trace: of A, () float64.
        rounding: ε of the arithmetic in which rows are summed.
    """
    share = max(torch.finfo(trace.dtype).eps / TOLERATED, (rounding / TOLERATED) ** 2)
    return share * trace.clamp(min=0)


NODES = 192  # of the quadrature: its error is 1e-12 where ‖A‖ is up to 10²⁴ ε²


def weights_with_border(
    eigenvalues: Tensor, Q: Tensor, border: Tensor, newest: int, eps: Tensor, rounding: float
) -> Tensor:
    """(√A + εI)⁻¹ e_t for A = [B X; Xᵀ N] with B = QΛQᵀ given, and t a row of the border [X; N].

    For x ≥ 0,  1/(√x + ε) = (2/π) ∫₀^∞ y²/(y² + ε²) · 1/(x + y²) dy,  hence what is wanted is an integral over
    (A + y²I)⁻¹ e_t = [−Q (Λ + y²)⁻¹ Z b; b]  with  b = (N + y²I − Zᵀ(Λ + y²)⁻¹Z)⁻¹ e_t,  Z = QᵀX.  After y = e^τ the
    integrand is analytic in |Im τ| < π/2 for all x, so the trapezoidal rule converges exponentially: steps of 0.3 give
    14 digits. Towards y = 0 the integrand vanishes; beyond the last node it is (2/π)/y, and is summed up.

    Rounding can make A indefinite by more than is provided for; the result is then that of the newest row alone.

    Args:
        eigenvalues: (k,) float64, Λ.
        Q: (k, k).
        border: (m, m − k).
        newest: t ≥ k.
        eps: ε, () float64.
        rounding: see `floor`.

    Returns:
        (m,) float64.
    """
    kept, size, t = len(Q), border.shape[1], newest - len(Q)
    X, N, identity = border[:kept], border[kept:], torch.eye(size, dtype=border.dtype, device=border.device)
    eigenvalues = eigenvalues.clamp(min=0)
    trace = eigenvalues.sum() + N.trace()
    first, last = eps.log() - 28, torch.maximum(trace.sqrt(), eps).log() + 10
    step = (last - first) / (NODES - 1)
    y = (first + step * torch.arange(NODES, dtype=border.dtype, device=border.device)).exp()
    factor = step * y * (2 / math.pi) * y**2 / (y**2 + eps**2)  # (nodes,), with dy = y dτ

    Z = Q.t() @ X  # (k, size)
    shift = floor(trace, rounding) + y**2
    inverse = 1 / (eigenvalues + shift[:, None])  # (nodes, k)
    products = (Z[:, :, None] * Z[:, None, :]).flatten(1)  # (k, size²)
    schur = N + shift[:, None, None] * identity - (inverse @ products).view(-1, size, size)
    root, failed = torch.linalg.cholesky_ex(schur)
    b = torch.cholesky_solve(identity[:, t, None], root).squeeze(2)  # (nodes, size)
    beyond = (2 / math.pi) / y[-1] * step / torch.expm1(step)
    weights = torch.cat([-(Q @ (factor @ (inverse * (b @ Z.t())))), factor @ b + beyond * identity[t]])
    alone = torch.zeros_like(weights)
    alone[newest] = 1 / (N[t, t].clamp(min=0).sqrt() + eps)
    return torch.where((failed == 0).all(), weights, alone)
