"""Preconditioners: from the Gram matrix S of the window to the weights w of its rows.

The update is u = Gᵀ f(S) e_t, where e_t picks the newest row. All work is on m × m matrices in float64, whatever the
model's size. A new preconditioner, in this file or elsewhere, is a subclass of `Preconditioner`;
`examples/custom_preconditioner.py` is a complete one.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from efcp import kernels
from efcp.checks import is_number, require, require_integer, require_number
from efcp.gram import Gram, host_can_look
from efcp.kernels.reference import missed


@dataclass(frozen=True)
class Preconditioner(ABC):
    """Options of a preconditioner. They become options of the param groups, all of which must agree on them.

    A subclass is a frozen dataclass, its options are its fields, and `__post_init__` may check them. It is made anew
    from the options of the param groups in each step, so they are plain values that `torch.load` reads with
    weights_only. Their names must differ from those of `EFCP` and of the compressor.
    """

    fixed: ClassVar[tuple[str, ...]] = ()  # options that determine the state's shapes

    @property
    def options(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def allocate(self, window: int, device: torch.device) -> dict[str, Any]:
        """New state, for a window of zero rows: what it derives from the Gram matrix and keeps beside it.

        Tensors on the device, and numbers that are never negative. The names of the Gram matrix's own state
        (`efcp.gram`) are taken, and so are version and those of the compressor's state.
        """
        return {}

    @abstractmethod
    def weights(self, gram: Gram, slot: Tensor) -> Tensor:
        """The weights w = f(S) e_t of the rows in the update Gᵀw.

        Args:
            gram: the Gram matrix S in `gram.matrix`, and what `allocate` has given in `gram.state`. Since the last call
                row and column `slot` of S have changed, and nothing else, unless there was a call of `refresh`.
            slot: (1,) int64, the newest row.

        Returns:
            (m,) float64; finite, also where the newest row is zero.
        """

    def refresh(self, gram: Gram) -> None:  # noqa: B027  (there may be nothing)
        """Derives anew from the Gram matrix what is kept beside it, as after windows were changed by somebody else."""


@dataclass(frozen=True)
class MFAC(Preconditioner):
    """M-FAC: f(S) = (λI + S/m)⁻¹, so that u = (λI + GᵀG/m)⁻¹c for the newest row c (arXiv 2107.03356; 2306.06098).

    A square root R of the inverse is kept, RᵀR = (mλI + S)⁻¹, and the column of RᵀR that belongs to the row which is
    replaced next. They follow each replaced row in O(m²). R is computed anew once in m steps and whenever the damping
    changes. One step of iterative refinement removes from the weights what the updates have gathered in rounding errors
    meanwhile. On a CPU, where looking at a number does not make anybody wait, it is left out where weights solve the
    system to ten digits, and R is also computed anew where they miss six digits of a system that float64 can solve:
    rows that it could not solve for leave such errors behind.

    Where squared norms of gradients exceed 10¹⁰ λ and rows of the window depend on each other, float64 cannot solve the
    system. Where they exceed 10⁶ λ and parameters are float32, the weighted rows cancel so far that rounding is what is
    left of their sum. Weights that miss the system by 10% or more, or whose update would be rounded by 10% of its
    length or more, are replaced: the step then goes along the newest row c alone, as far as is best for the same
    F = λI + GᵀG/m, u = c · ‖c‖² / cᵀFc. Such steps are counted in `imprecise_steps`, of which there is a warning.

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
        return {
            "inverse_root": root,
            "inverse_column": root[0] * root[0, 0],
            "inverse_age": 0,
            "inverse_damping": float(self.damping),
            "imprecise_steps": torch.zeros((), dtype=torch.int64, device=device),
        }

    def weights(self, gram: Gram, slot: Tensor) -> Tensor:
        S, state = gram.matrix, gram.state
        R, column = state["inverse_root"], state["inverse_column"]
        window = len(S)
        ridge = window * self.damping
        x, miss = kernels.update_inverse_root_(R, column, S, slot, ridge)
        capturing = R.is_cuda and torch.cuda.is_current_stream_capturing()  # each replay would do it, or none
        if (state["inverse_age"] >= window or state["inverse_damping"] != self.damping) and not capturing:
            x, miss = self._refreshed_column(gram, slot)
        state["inverse_age"] += 1

        if host_can_look(S):
            error = math.sqrt(torch.dot(miss, miss).item())
            if error < 1e-10:
                return self._unless_rounded(gram, slot, x, miss, None)
            if error > 1e-6 and S.trace() < 1e10 * ridge:  # of rows that have left the window
                x, miss = self._refreshed_column(gram, slot)
        x = x + R.t() @ (R @ miss)
        miss = missed(x, S, slot, ridge)
        solved = torch.linalg.vector_norm(miss) < 0.1
        if not host_can_look(S) or not solved:
            diagonal = S.diagonal() + ridge
            following = gram.following_slot
            alone = torch.zeros_like(x).index_fill_(0, following, 1.0) / diagonal
            torch.where(solved, R, R.new_zeros(()), out=R).diagonal().add_(torch.where(solved, 0.0, diagonal.rsqrt()))
            torch.where(solved, column, alone, out=column)
        return self._unless_rounded(gram, slot, x, miss, solved)

    def _unless_rounded(self, gram: Gram, slot: Tensor, x: Tensor, miss: Tensor, solved: Tensor | None) -> Tensor:
        """The weights m · x, or those of the newest row alone where they are not `solved` or rounding would spoil u.

        ‖u‖ is known in two ways that lose different digits: ‖u‖² = m(w_t − λ‖w‖² − ⟨w, miss⟩), and at least ⟨c, u⟩/‖c‖.
        """
        S, m = gram.matrix, len(x)
        w = m * x
        newest = S.index_select(0, slot).squeeze(0)
        square = newest.index_select(0, slot).squeeze(0)  # ‖c‖²
        inner = torch.dot(newest, w)  # ⟨c, u⟩
        squared_norm = m * (w.index_select(0, slot).squeeze(0) - self.damping * torch.dot(w, w) - torch.dot(w, miss))
        squared_norm = torch.maximum(squared_norm, inner * inner / square)
        rounding = gram.rounding**2 * torch.dot(w, w) * S.trace()  # of ‖u‖, squared, at most
        sound = (rounding <= 0.01 * squared_norm) | (square == 0)
        if solved is not None:
            sound &= solved
        if host_can_look(S) and sound:
            return w
        gram.state["imprecise_steps"] += ~sound
        curvature = self.damping + torch.dot(newest, newest) / (m * square)  # cᵀFc / ‖c‖²
        return torch.where(sound, w, torch.zeros_like(w).index_fill_(0, slot, 1.0) / curvature)

    def _refreshed_column(self, gram: Gram, slot: Tensor) -> tuple[Tensor, Tensor]:
        self.refresh(gram)
        R = gram.state["inverse_root"]
        x = R.t() @ R.index_select(1, slot).squeeze(1)
        return x, missed(x, gram.matrix, slot, len(R) * self.damping)

    def refresh(self, gram: Gram) -> None:
        R = gram.state["inverse_root"]
        invert_(R, gram.matrix, len(R) * self.damping)
        gram.state["inverse_column"].copy_(R.t() @ R.index_select(1, gram.following_slot).squeeze(1))
        gram.state["inverse_age"], gram.state["inverse_damping"] = 0, float(self.damping)


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

    Updates are at most 1 long. So that rounding leaves this so, DSD + φI takes the place of DSD, with φ the share of
    its trace that `floor` gives: 4e-13 where all parameters are float64, else 6e-8. It damps directions whose singular
    values are below 7e-7, or 2.4e-4, of the root of that trace.

    An eigendecomposition of an m × m matrix each step is slow for large m, and makes a GPU wait for the host once
    (`torch.linalg.eigh` checks its own success). With `refresh_every` n > 1 only every n-th step does one, of the m − n
    rows that these n steps will not replace. The weights are the same up to rounding: the n other rows, the newest
    among them, enter exactly (`weights_with_border`), in O(m² + m n²). This pays for windows of some hundreds of rows
    and more; it takes 8 (m − n)² bytes of state.

    Args:
        eps: ε > 0.
        beta2: β₂ in (0, 1].
        refresh_every: n ≥ 1, steps from one eigendecomposition to the next; fixed from the first step on, where
            later changes have no effect.

    Raises:
        ValueError: for other values.
    """

    eps: float = 1e-5
    beta2: float = 1.0
    refresh_every: int = 1

    fixed = ("refresh_every",)

    def __post_init__(self) -> None:
        require_number("eps", self.eps, 0, open_low=True)
        require(is_number(self.beta2) and 0 < self.beta2 <= 1, "beta2", "lie in (0, 1]", self.beta2)
        require_integer("refresh_every", self.refresh_every, 1)

    def allocate(self, window: int, device: torch.device) -> dict[str, Any]:
        if self.refresh_every == 1:
            return {}
        kept = window - min(self.refresh_every, window)  # no row is there yet: the matrix is zero
        return {
            "eigenvalues": torch.zeros(kept, dtype=torch.float64, device=device),
            "eigenvectors": torch.eye(kept, dtype=torch.float64, device=device),
            "eigen_age": 0,
            "eigen_beta2": float(self.beta2),
        }

    def weights(self, gram: Gram, slot: Tensor) -> Tensor:
        S = gram.matrix
        age = (slot - torch.arange(len(S), device=S.device)) % len(S)
        decay = self.beta2 ** age.double()
        if "eigenvalues" in gram.state:
            return decay * self._bordered_weights(gram, decay, slot)
        eigenvalues, Q = torch.linalg.eigh(decay[:, None] * S * decay)
        root = (eigenvalues.clamp(min=0) + floor(eigenvalues.sum(), gram.rounding)).sqrt()
        return decay * (Q @ (Q.index_select(0, slot).squeeze(0) / (root + self.eps)))

    def _bordered_weights(self, gram: Gram, decay: Tensor, slot: Tensor) -> Tensor:
        """(√A + εI)⁻¹ e_t, A = DSD, from the eigendecomposition of the rows that stay the same for n steps."""
        S, state = gram.matrix, gram.state
        window, kept = len(S), len(state["eigenvalues"])
        refresh = state["eigen_age"] >= window - kept or state["eigen_beta2"] != self.beta2
        age = 0 if refresh else state["eigen_age"]
        order = (slot - age - kept + torch.arange(window, device=S.device)) % window  # kept rows, then those replaced

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
        weights = weights_with_border(eigenvalues, state["eigenvectors"], border, kept + age, self.eps, gram.rounding)
        return torch.zeros_like(weights).index_copy_(0, order, weights)

    def refresh(self, gram: Gram) -> None:
        if "eigen_age" in gram.state:
            gram.state["eigen_age"] = len(gram.matrix)  # the next step decomposes


TOLERATED = 5e-4  # of the length of an update, by which rounding may change it


def floor(trace: Tensor, rounding: float) -> Tensor:
    """What to add to all eigenvalues of A = (DG)(DG)ᵀ, so that rounding does not make updates longer than 1.

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
    eigenvalues: Tensor, Q: Tensor, border: Tensor, newest: int, eps: float, rounding: float
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
        eps: ε.
        rounding: see `floor`.

    Returns:
        (m,) float64.
    """
    kept, size, t = len(Q), border.shape[1], newest - len(Q)
    X, N, identity = border[:kept], border[kept:], torch.eye(size, dtype=border.dtype, device=border.device)
    eigenvalues = eigenvalues.clamp(min=0)
    trace = eigenvalues.sum() + N.trace()
    first, last = math.log(eps) - 28, trace.sqrt().clamp(min=eps).log() + 10
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
