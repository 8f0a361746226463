"""Shampoo's Kronecker factors from a low-rank window: (L + δ_L)^(−1/4) a (R + δ_R)^(−1/4) for each matrix by itself.

With the rows A_i = P_i Q_iᵀ of the window, L = Σ A_i A_iᵀ and R = Σ A_iᵀ A_i. (How many rows are held does not matter:
δ grows with the sums, and the update is scaled afterwards.) With B_i = Q_iᵀQ_i and P = [P_1 … P_m], L = P B Pᵀ has the
non-zero eigenvalues s of the m r × m r matrix K = √B PᵀP √B = V diag(s) Vᵀ, and

    (L + δ)^p = δ^p (I + P M Pᵀ),   M = √B V diag(((1 + s/δ)^p − 1) / s) Vᵀ √B

so no matrix of the parameter's size is decomposed. Where m r is more than the side of the matrix, L = U diag(s) Uᵀ is
decomposed instead: V = √B Pᵀ U diag(s)^(−1/2), and the other eigenvalues of K are 0, so that

    M = (p/δ) B + √B V diag(((1 + s/δ)^p − 1) / s − p/δ) Vᵀ √B

R is the same with P and Q exchanged. State of a parameter, only where the metric is not computed anew in each step:

    metrics     (sides, m r, m r)  float32  M of each side that is used; of a parameter that is kept whole (1, m, m)
    metric_age  int                steps since they were computed
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efcp.checks import require_integer, require_number
from efcp.preconditioners.base import LocalPreconditioner
from efcp.windows import LowRank, batched
from efcp.windows.base import Compressor, SingleWindow
from efcp.windows.dense import DenseWindow
from efcp.windows.lowrank import LowRankWindow

SMALLEST = 1e-14  # of the largest eigenvalue; what is smaller is rounding


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
        if isinstance(window, DenseWindow):  # in parts, whatever its size
            update, weights = vector.clone(), metrics[0].double() @ window.products(vector)
            window.apply_(update, weights, torch.ones_like(weights[0]))
            return update
        return self.update_all([window], [metrics], vector[None])[0]

    def update_all(self, windows: Sequence[Any], metrics: Sequence[Tensor], vectors: Tensor) -> Tensor:
        metric = torch.stack(list(metrics))  # (p, sides, m r, m r)
        if isinstance(windows[0], DenseWindow):
            rows = torch.stack([w.rows for w in windows])  # (p, m, n)
            weights = metric[:, 0].double() @ (rows.double() @ vectors.double().unsqueeze(2))
            return vectors + (rows.to(vectors.dtype).mT @ weights.to(vectors.dtype)).squeeze(2)
        left, right = LowRankWindow.stacked(windows, vectors.dtype)  # (p, m r, R), (p, m r, C)
        update, metric = vectors.view(len(windows), left.shape[2], -1), metric.to(vectors.dtype)
        for number, side in enumerate(self._sides(windows[0])):
            if side == 0:
                update = torch.baddbmm(update, left.mT, metric[:, number] @ (left @ update))
            else:
                update = torch.baddbmm(update, (update @ right.mT) @ metric[:, number], right)
        return update.flatten(1)

    def _sides(self, window: LowRankWindow) -> tuple[int, ...]:
        """The sides that are used: 0 is the left one, of the rows, 1 the right one, of the columns."""
        if self.sides == 2:
            return 0, 1
        return (0,) if window.left.shape[2] <= window.right.shape[2] else (1,)

    def _computed(self, windows: Sequence[SingleWindow], slot: Tensor) -> list[Tensor]:
        """The metrics of each window, as in the state. Windows of a shape are taken together."""
        alike: dict[Any, list[int]] = {}
        for number, window in enumerate(windows):
            assert isinstance(window, DenseWindow | LowRankWindow)
            alike.setdefault((window.kind, window.numel, _device(window)), []).append(number)
        found: list[Tensor] = [torch.empty(0)] * len(windows)
        for (_, _, device), numbers in alike.items():
            first: Any = windows[numbers[0]]
            kept = self._kept(len(first), slot.to(device))
            size = len(first) if isinstance(first, DenseWindow) else math.prod(first.left.shape[:2])
            step = max(1, batched.BATCH // max(size**2, len(first) * first.row_numel))
            for start in range(0, len(numbers), step):
                batch = numbers[start : start + step]
                for number, metrics in zip(batch, self._of_batch([windows[n] for n in batch], kept), strict=True):
                    found[number] = metrics
        return found

    def _of_batch(self, windows: list[Any], kept: Tensor) -> Tensor:
        """The metrics of p windows of one shape: (p, sides, m r, m r) float64; dense (p, 1, m, m)."""
        if isinstance(windows[0], DenseWindow):
            rows = torch.stack([w.rows for w in windows]).double()  # (p, m, n)
            return self._metric(kept[:, None, None], rows.unsqueeze(2), -0.5).unsqueeze(1)
        rows = windows[0].left.shape[:2]  # m, r
        factors = [f.unflatten(1, rows) for f in LowRankWindow.stacked(windows, torch.float64)]  # (p, m, r, ·)
        power = -0.25 if self.sides == 2 else -0.5
        metrics = []
        for side in self._sides(windows[0]):
            own, other = factors[side], factors[1 - side]
            metrics.append(self._metric(_root(other @ other.mT) * kept[:, None, None], own, power))
        return torch.stack(metrics, 1)

    def _metric(self, roots: Tensor, own: Tensor, power: float) -> Tensor:
        """M of one side, (p, m r, m r).

        Args:
            roots: the diagonal blocks of √B, (p, m, r, r) or what broadcasts to it.
            own: the factors of the side, (p, m, r, its dimension).
            power: p of (L + δ)^p.
        """
        X = (roots @ own).flatten(1, 2)  # (p, m r, dimension): K = XXᵀ, L = XᵀX
        size, dimension = X.shape[1:]
        by_side = 0 < dimension < size
        s, V = torch.linalg.eigh(X.mT @ X if by_side else X @ X.mT)
        s = s.clamp(min=0)
        delta = self.damping * s.sum(1, keepdim=True) / dimension
        ratio, least = torch.where(delta > 0, s / delta, 0.0), power / delta
        # ((1 + s/δ)^p − 1) / s, whose limit at 0 is p/δ
        change = torch.where(ratio > 1e-12, torch.expm1(power * ratio.log1p()) / s, least)
        if by_side:
            V, change = X @ V, torch.where(s > SMALLEST * s.amax(1, keepdim=True), (change - least) / s, 0.0)
        half = (roots @ V.unflatten(1, own.shape[1:3])).flatten(1, 2)
        M = (half * change[:, None, :]) @ half.mT
        if by_side:
            blocks = M.view(-1, *own.shape[1:3], *own.shape[1:3]).diagonal(dim1=1, dim2=3)  # (p, r, r, m)
            blocks += (roots @ roots.mT).movedim(-3, -1) * least[..., None, None]
        return torch.where(delta[..., None] > 0, M, 0.0)

    def _kept(self, window_size: int, slot: Tensor) -> Tensor:
        """Which rows count, (m,) float64: not those that the next refresh_every − 1 steps replace."""
        age = (slot - torch.arange(window_size, device=slot.device)) % window_size
        return (age <= window_size - min(self.refresh_every, window_size)).double()


def _device(window: SingleWindow) -> torch.device:
    tensor = window.rows if isinstance(window, DenseWindow) else window.left  # type: ignore[attr-defined]
    return tensor.device


def _root(matrices: Tensor) -> Tensor:
    """The symmetric square roots of positive semidefinite matrices (…, r, r)."""
    eigenvalues, vectors = torch.linalg.eigh(matrices)
    return (vectors * eigenvalues.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT
