"""M-FAC: weights from (λI + S/m)⁻¹, of which a square root is kept and follows each replaced row."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efcp import kernels
from efcp.checks import require, require_number
from efcp.gram import Gram, is_on_cpu
from efcp.kernels.reference import column_residual, restart_, sound_weights
from efcp.preconditioners.base import Preconditioner

MOST_ROWS = {"cpu": 256, "cuda": 1024}  # with which one thread, or one program of a GPU, does all algebra of a step


@dataclass(frozen=True)
class MFAC(Preconditioner):
    """M-FAC: f(S) = (λI + S/m)⁻¹, so that u = (λI + GᵀG/m)⁻¹c for the newest row c (arXiv 2107.03356; 2306.06098).

    A square root R of the inverse is kept, RᵀR = (mλI + S)⁻¹, and the column of RᵀR that belongs to the row which is
    replaced next. They follow each replaced row in O(m²). R is computed anew once in m steps and whenever the damping
    changes. One step of iterative refinement removes from the weights the rounding errors gathered since. On a CPU,
    where reading a value is free, R is also computed anew when the residual exceeds 10⁻⁶ on a well-conditioned
    system, as after rows that float64 could not solve for. One call does the algebra of a step in which R is not
    computed anew, for up to 256 rows on a CPU and 1,024 on a GPU.

    Where squared norms of gradients exceed 10¹⁰ λ and rows of the window depend on each other, float64 cannot solve the
    system. Where they exceed 10⁶ λ and parameters are float32, the weighted rows cancel so far that rounding is what is
    left of their sum. Weights that miss the system by 10% or more, or whose update would be rounded by 10% of its
    length or more, are replaced: the step then goes along what is preconditioned, x, as far as is best for the same
    F = λI + GᵀG/m, u = x · ‖x‖² / xᵀFx. Such steps are counted in `imprecise_steps`, of which there is a warning.

    With a relative damping κ the ridge mλ is κ times the mean squared length of the rows held. It moves with each step,
    so the system is solved by Cholesky each time, in O(m³), and nothing is kept: 0.1 ms for 32 rows, and some 20 ms for
    1,024 on a CPU.

    Args:
        damping: λ > 0; κ > 0 where `relative`.
        relative: whether the damping is relative to the gradients. It then means the same for every loss, batch size,
            window and model.

    Raises:
        ValueError: for other values.
    """

    damping: float = 1e-3
    relative: bool = False

    fixed = ("relative",)

    def __post_init__(self) -> None:
        require_number("damping", self.damping, 0, open_low=True)
        require(isinstance(self.relative, bool), "relative", "be True or False", self.relative)

    def allocate(self, window_size: int, device: torch.device) -> dict[str, Any]:
        counter = {"imprecise_steps": torch.zeros((), dtype=torch.int64, device=device)}
        if self.relative:
            return counter
        root = torch.eye(window_size, dtype=torch.float64, device=device) * (window_size * self.damping) ** -0.5
        return {
            "inverse_root": root,
            "inverse_column": root[0] * root[0, 0],
            "inverse_age": 0,
            "inverse_damping": float(self.damping),
            **counter,
        }

    def step_along_row(
        self, gram: Gram, slot: Tensor, finite: Tensor, dots: Tensor, longest: float | None, length: float | None
    ) -> bool:
        state, window_size = gram.state, len(dots)
        if self.relative or window_size > MOST_ROWS.get(dots.device.type, 0) or not kernels.is_fused(dots):
            return False
        if self._must_refresh(gram):  # of the rows with the newest among them, which the parts of a step do
            return False
        own = kernels.RowStep(*(state[name] for name in kernels.RowStep._fields))
        kernels.mfac_row_step_(own, dots, slot, finite, self.damping, gram.rounding, longest, length)
        state["inverse_age"] += 1
        return True

    def weights(self, gram: Gram, slot: Tensor) -> Tensor:
        newest = torch.zeros_like(gram.matrix[0]).index_fill_(0, slot, 1.0)
        if self.relative:
            return self.weights_of_rows(gram, slot, newest)
        x, residual, solved = self._newest_column(gram, slot)
        return self._sound_weights(gram, newest, gram.matrix.index_select(0, slot).squeeze(0), x, residual, solved)

    def weights_of_rows(self, gram: Gram, slot: Tensor, combination: Tensor) -> Tensor:
        products = gram.matrix @ combination
        return self._sound_weights(gram, combination, products, *self._solution(gram, slot, combination))

    def weights_of_vector(self, gram: Gram, slot: Tensor, products: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """As `Preconditioner` says; γ = 1/λ, w = −(mλI + S)⁻¹ b / λ.

        With y = (mλI + S)⁻¹ b up to a residual r,  λ²‖u‖² = ‖a‖² − ⟨y, b⟩ − ⟨y, r⟩ − mλ‖y‖²  and
        λ⟨a, u⟩ = ‖a‖² − ⟨y, b⟩.
        """
        y, residual, solved = self._solution(gram, slot, products)
        ridge, m = self._ridge(gram), len(y)
        inner = square - torch.dot(y, products)
        squared_norm = inner - torch.dot(y, residual) - ridge * torch.dot(y, y)
        squared_norm = torch.maximum(squared_norm, inner.clamp(min=0).square() / square)
        rounding = gram.rounding**2 * (square + torch.dot(y, y) * gram.matrix.trace())
        sound = self._counted(gram, (rounding <= 0.01 * squared_norm) | (square == 0), solved)
        damping = ridge / m
        curvature = damping + torch.where(square > 0, torch.dot(products, products) / (m * square), 0.0)
        return torch.where(sound, 1 / damping, 1 / curvature), torch.where(sound, -y / damping, 0.0)

    def _ridge(self, gram: Gram) -> Tensor:
        """mλ, () float64."""
        if self.relative:
            return self.damping * gram.mean_square()
        return gram.matrix.new_tensor(len(gram.matrix) * self.damping)

    def _solution(self, gram: Gram, slot: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """y = (mλI + S)⁻¹ x, its residual x − (mλI + S) y, and whether that is small; None where it is sure to be."""
        S, ridge = gram.matrix, self._ridge(gram)
        if self.relative:
            A = S.clone()
            A.diagonal().add_(ridge)
            root, _ = torch.linalg.cholesky_ex(A)
            y = torch.cholesky_solve(x[:, None], root).squeeze(1)
        else:
            _, _, solved = self._newest_column(gram, slot)
            R = gram.state["inverse_root"]
            y = R.t() @ (R @ x)
            y = y + R.t() @ (R @ (x - torch.addmv(ridge * y, S, y)))
        residual = x - torch.addmv(ridge * y, S, y)
        solved = torch.linalg.vector_norm(residual) <= 0.1 * torch.linalg.vector_norm(x)
        return torch.where(solved, y, 0.0), torch.where(solved, residual, 0.0), solved

    def _newest_column(self, gram: Gram, slot: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Follows the new row of S; `_solution` for the newest row."""
        S, state = gram.matrix, gram.state
        R, column = state["inverse_root"], state["inverse_column"]
        window_size = len(S)
        ridge = window_size * self.damping
        x, residual = kernels.update_inverse_root_(R, column, S, slot, ridge)
        if self._must_refresh(gram):
            x, residual = self._refreshed_column(gram, slot)
        state["inverse_age"] += 1

        if is_on_cpu(S):
            error = math.sqrt(torch.dot(residual, residual).item())
            if error < 1e-10:
                return x, residual, None
            if error > 1e-6 and S.trace() < 1e10 * ridge:  # of rows that have left the window
                x, residual = self._refreshed_column(gram, slot)
        x = x + R.t() @ (R @ residual)
        residual = column_residual(x, S, slot, ridge)
        solved = torch.linalg.vector_norm(residual) < 0.1
        if not is_on_cpu(S) or not solved:
            restart_(R, column, S, gram.following_slot, ridge, solved)
        return x, residual, solved

    def _must_refresh(self, gram: Gram) -> bool:
        state, R = gram.state, gram.state["inverse_root"]
        due = state["inverse_age"] >= len(R) or state["inverse_damping"] != self.damping
        return due and not kernels.is_capturing(R.device)  # each replay would do it, or none

    def _sound_weights(
        self, gram: Gram, x: Tensor, products: Tensor, y: Tensor, r: Tensor, solved: Tensor | None
    ) -> Tensor:
        """The weights m · y for the combination c = Gᵀx, with products Gc; or those of the best step along c where
        they are not `solved`, or rounding would spoil u.
        """
        others, sound = sound_weights(gram.matrix, x, products, y, r, self._ridge(gram) / len(x), gram.rounding)
        return torch.where(self._counted(gram, sound, solved), len(x) * y, others)

    def _counted(self, gram: Gram, sound: Tensor, solved: Tensor | None) -> Tensor:
        """Whether weights are solved and sound. Where they are not, the step is counted."""
        if solved is not None:
            sound = sound & solved
        gram.state["imprecise_steps"] += ~sound
        return sound

    def _refreshed_column(self, gram: Gram, slot: Tensor) -> tuple[Tensor, Tensor]:
        self.refresh(gram)
        R = gram.state["inverse_root"]
        x = R.t() @ R.index_select(1, slot).squeeze(1)
        return x, column_residual(x, gram.matrix, slot, len(R) * self.damping)

    def refresh(self, gram: Gram) -> None:
        if self.relative:
            return
        R = gram.state["inverse_root"]
        invert_(R, gram.matrix, len(R) * self.damping)
        gram.state["inverse_column"].copy_(R.t() @ R.index_select(1, gram.following_slot).squeeze(1))
        gram.state["inverse_age"], gram.state["inverse_damping"] = 0, float(self.damping)


def invert_(R: Tensor, S: Tensor, ridge: float) -> None:
    """RᵀR ← (ridge · I + S)⁻¹ by Cholesky; R is unchanged if rounding has made that matrix indefinite."""
    A = S.clone()
    A.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(A)
    root = torch.linalg.solve_triangular(factor, torch.eye(len(S), dtype=S.dtype, device=S.device), upper=False)
    R.copy_(torch.where(failed == 0, root, R))
