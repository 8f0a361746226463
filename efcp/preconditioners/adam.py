"""Adam's moments of the rows in the window, entry by entry (MicroAdam, arXiv 2405.15593).

    u = M / (√W + ε),   M = c₁ Σᵢ β₁^ageᵢ Gᵢ,   W = c₂ Σᵢ β₂^ageᵢ Gᵢ²,   cₖ = (1 − βₖ) / (1 − βₖⁿ)

The newest row has age 0. With the correction "window" n is the number of rows held, so that weights sum to 1, as Adam's
do. With "step", the published one, n is the number of steps. The rows that have left the window are missing from such
sums, so u grows: with a window of 10 and the default betas a constant gradient gives |u| = 6.5 in the end, where Adam
gives 1.

Steps that were skipped do not count in n; their rows are zeros. There is no state beside the counters of `efcp.gram`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from efcp.checks import require, require_betas, require_number
from efcp.gram import Gram
from efcp.preconditioners.base import Preconditioner
from efcp.windows.base import Compressor
from efcp.windows.lowrank import LowRank

CORRECTIONS = ("window", "step")


@dataclass(frozen=True)
class AdamStats(Preconditioner):
    """Adam's first and second moments, as sums over the rows of the window (MicroAdam, arXiv 2405.15593).

    Windows must give sums of squares, so low-rank ones are refused. The direction is "row", and `update_rms` and
    `max_update_norm` are None: the length of an update is not known before it is taken.

    Args:
        betas: β₁ and β₂, each in [0, 1).
        eps: ε, at least the smallest normal float32, 1.2e-38.
        correction: "window", for sums over the rows held; or "step", as published.

    Raises:
        ValueError: for other values.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    correction: str = "window"

    uses_gram = False

    def __post_init__(self) -> None:
        require_betas(self.betas)
        object.__setattr__(self, "betas", tuple(self.betas))  # the class is frozen; param groups hold a list
        require_number("eps", self.eps, torch.finfo(torch.float32).smallest_normal)
        allowed = f"be one of {', '.join(CORRECTIONS)}"
        require(self.correction in CORRECTIONS, "correction", allowed, self.correction)

    def check_compressor(self, compressor: Compressor) -> None:
        if isinstance(compressor, LowRank):
            raise TypeError(
                f"compressor must not be efcp.LowRank with {type(self).__name__}: factors give no sums of the squares "
                f"of rows; got {compressor!r}"
            )

    def weights(self, gram: Gram, slot: Tensor) -> Tensor:
        return self._moment(gram, slot, self.betas[0])

    def square_weights(self, gram: Gram, slot: Tensor) -> tuple[Tensor, Tensor]:
        weights = self._moment(gram, slot, self.betas[1])
        return weights, torch.full_like(weights[0], self.eps)

    def _moment(self, gram: Gram, slot: Tensor, beta: float) -> Tensor:
        """The weights c β^age of the rows, (m,) float64."""
        steps = (gram.state["step"] - gram.state["skipped_steps"]).clamp(min=1)
        n = steps.clamp(max=len(gram.matrix)) if self.correction == "window" else steps
        return beta ** gram.ages(slot).double() * ((1 - beta) / (1 - beta ** n.double()))
