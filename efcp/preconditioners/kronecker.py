"""Shampoo's Kronecker factors from a low-rank window: (L + δ_L)^(−1/4) a (R + δ_R)^(−1/4) for each matrix by itself.

With the rows A_i = P_i Q_iᵀ of the window, L = Σ A_i A_iᵀ and R = Σ A_iᵀ A_i. (How many rows are held does not matter:
δ grows with the sums, and the update is scaled afterwards.) With B_i = Q_iᵀQ_i and P = [P_1 … P_m], L = P B Pᵀ has the
non-zero eigenvalues s of the m r × m r matrix K = √B PᵀP √B = V diag(s) Vᵀ, and

    (L + δ)^p = δ^p (I + P M Pᵀ),   M = √B V diag(((1 + s/δ)^p − 1) / s) Vᵀ √B

so no matrix of the parameter's size is decomposed. R is the same with P and Q exchanged. State of a parameter, only
where the metric is not computed anew in each step:

    metrics     (sides, m r, m r)  float32  M of each side that is used; of a parameter that is kept whole (1, m, m)
    metric_age  int                steps since they were computed
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from efcp.checks import require_integer, require_number
from efcp.preconditioners.base import LocalPreconditioner
from efcp.windows import LowRank
from efcp.windows.base import Compressor, SingleWindow
from efcp.windows.dense import DenseWindow
from efcp.windows.lowrank import LowRankWindow


@dataclass(frozen=True)
class Kronecker(LocalPreconditioner):
    """Shampoo (arXiv 1802.09568) of the rows in a low-rank window, for the dense momentum of each matrix by itself.

    Parameters whose gradients are kept whole, vectors among them, get the full-matrix form (GᵀG + δI)^(−1/2) a.

    Args:
        damping: κ > 0: δ is κ times the mean of the diagonal of L, or R.
        sides: 2, L and R with the power −1/4; or 1, with the power −1/2 that of the shorter side alone.
        refresh_every: n ≥ 1, at most the window: steps from one computation of the metric to the next. In between,
            rows that are new do not count yet. The n − 1 oldest rows, which will be replaced meanwhile, never do.

    Raises:
        ValueError: for other values.
    """

    damping: float = 1e-4
    sides: int = 2
    refresh_every: int = 1

    fixed = ("sides", "refresh_every")

    def __post_init__(self) -> None:
        require_number("damping", self.damping, 0, open_low=True)
        require_integer("sides", self.sides, 1, 2)
        require_integer("refresh_every", self.refresh_every, 1)

    def check_compressor(self, compressor: Compressor) -> None:
        if not isinstance(compressor, LowRank):
            raise TypeError(f"compressor must be efcp.LowRank with Kronecker, got {compressor!r}")

    def allocate_local(self, rows: dict[str, Tensor]) -> dict[str, Any]:
        if self.refresh_every == 1:
            return {}
        whole = rows.get("rows")
        sides, size = (self.sides, math.prod(rows["left"].shape[:2])) if whole is None else (1, len(whole))
        device = (rows["left"] if whole is None else whole).device
        return {"metrics": torch.zeros(sides, size, size, device=device), "metric_age": self.refresh_every}

    def metrics(self, windows: Sequence[SingleWindow], states: Sequence[dict[str, Any]], slot: Tensor) -> list[Tensor]:
        if self.refresh_every == 1:
            return self._computed(windows, slot)
        due = [number for number, state in enumerate(states) if state["metric_age"] >= self.refresh_every]
        for number, new in zip(due, self._computed([windows[i] for i in due], slot), strict=True):
            states[number]["metrics"].copy_(new)
            states[number]["metric_age"] = 0
        for state in states:
            state["metric_age"] += 1
        return [state["metrics"] for state in states]

    def update(self, window: SingleWindow, metrics: Tensor, vector: Tensor) -> Tensor:
        if isinstance(window, DenseWindow):
            weights = metrics[0].double() @ window.products(vector)
            update = vector.clone()
            window.apply_(update, weights, torch.ones_like(weights[0]))
            return update
        assert isinstance(window, LowRankWindow)
        left, right = window.factors(vector.dtype)  # (m r, R), (m r, C)
        update = vector.view(left.shape[1], right.shape[1])
        for side, metric in zip(self._sides(window), metrics.to(vector.dtype), strict=True):
            if side == 0:
                update = torch.addmm(update, left.t(), metric @ (left @ update))
            else:
                update = torch.addmm(update, (update @ right.t()) @ metric, right)
        return update.reshape(-1)

    def _sides(self, window: LowRankWindow) -> tuple[int, ...]:
        """The sides that are used: 0 is the left one, of the rows, 1 the right one, of the columns."""
        if self.sides == 2:
            return 0, 1
        return (0,) if window.left.shape[2] <= window.right.shape[2] else (1,)

    def _computed(self, windows: Sequence[SingleWindow], slot: Tensor) -> list[Tensor]:
        """The metrics of each window, as in the state. All matrices of a size are decomposed together."""
        problems: list[tuple[Tensor, Tensor, int, float]] = []  # √B, K, the dimension of the side, p
        counts = []
        for window in windows:
            before = len(problems)
            kept = self._kept(len(window), slot.to(_device(window)))
            if isinstance(window, DenseWindow):
                roots = kept.diag_embed()
                rows = window.rows.double() * kept[:, None]
                problems.append((roots, rows @ rows.t(), rows.shape[1], -0.5))
            else:
                assert isinstance(window, LowRankWindow)
                factors = [f.double() for f in (window.left, window.right)]  # (m, r, R), (m, r, C)
                for side in self._sides(window):
                    own, other = factors[side], factors[1 - side]
                    roots = torch.block_diag(*(_root(other @ other.mT) * kept[:, None, None]))
                    stacked = own.flatten(0, 1)
                    K = roots @ (stacked @ stacked.t()) @ roots
                    problems.append((roots, K, own.shape[2], -0.25 if self.sides == 2 else -0.5))
            counts.append(len(problems) - before)
        found: list[Tensor] = [torch.empty(0)] * len(problems)
        for size in {(len(K), K.device) for _, K, _, _ in problems}:
            same = [i for i, (_, K, _, _) in enumerate(problems) if (len(K), K.device) == size]
            eigenvalues, vectors = torch.linalg.eigh(torch.stack([problems[i][1] for i in same]))
            for i, s, V in zip(same, eigenvalues.clamp(min=0), vectors, strict=True):
                roots, _, dimension, power = problems[i]
                delta = self.damping * s.sum() / dimension
                ratio = torch.where(delta > 0, s / delta, 0.0)
                # ((1 + s/δ)^p − 1) / s, whose limit at 0 is p/δ
                change = torch.where(ratio > 1e-12, torch.expm1(power * ratio.log1p()) / s, power / delta)
                half = roots @ V
                found[i] = torch.where(delta > 0, (half * change) @ half.t(), 0.0)
        ends = accumulate(counts)
        return [torch.stack(found[end - count : end]) for count, end in zip(counts, ends, strict=True)]

    def _kept(self, window_size: int, slot: Tensor) -> Tensor:
        """Which rows count, (m,) float64: not those that the next refresh_every − 1 steps replace."""
        age = (slot - torch.arange(window_size, device=slot.device)) % window_size
        return (age <= window_size - min(self.refresh_every, window_size)).double()


def _device(window: SingleWindow) -> torch.device:
    tensor = window.rows if isinstance(window, DenseWindow) else window.left  # type: ignore[attr-defined]
    return tensor.device


def _root(matrices: Tensor) -> Tensor:
    """The symmetric square roots of positive semidefinite matrices (m, r, r)."""
    eigenvalues, vectors = torch.linalg.eigh(matrices)
    return (vectors * eigenvalues.clamp(min=0).sqrt()[:, None, :]) @ vectors.mT
