"""The Gram matrix S = G Gᵀ of the whole window, as a ring buffer.

Row and column `slot` belong to the gradient that was written there last; slots are filled in turn. A step replaces one
row of the window, hence one row and column of S. State:

    step             ()      int64    gradients taken in so far
    skipped_steps    ()      int64    of these, such with an Inf or NaN
    gram             (m, m)  float64  S
    weights          (m,)    float64  w of the newest update, which is Gᵀw; zero after a skipped step
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efcp.checkpoint import check_content, check_numbers
from efcp.checks import require


def allocate_gram(window: int, device: torch.device) -> dict[str, Tensor]:
    """The state of a Gram matrix of a window of zero rows."""
    return {
        "step": torch.zeros((), dtype=torch.int64, device=device),
        "skipped_steps": torch.zeros((), dtype=torch.int64, device=device),
        "gram": torch.zeros(window, window, dtype=torch.float64, device=device),
        "weights": torch.zeros(window, dtype=torch.float64, device=device),
    }


def check_gram(where: str, state: dict[str, Any]) -> None:
    """Raises ValueError unless a saved state of the right names, shapes and dtypes makes sense."""
    check_numbers(where, state)
    check_content(where, "gram", torch.equal(state["gram"], state["gram"].t()), "be symmetric")
    counted = 0 <= int(state["skipped_steps"]) <= int(state["step"])
    check_content(where, "step", counted, "not be negative, nor less than skipped_steps")


@dataclass(frozen=True)
class Gram:
    """The Gram matrix in a state that also holds what preconditioners derive from it."""

    state: dict[str, Any]

    def __post_init__(self) -> None:
        # Wrappers that load a state by themselves, through torch.optim.Optimizer, cast it to the parameters' dtype.
        allowed = "stay torch.float64, as the optimizer's own load_state_dict, not that of a wrapper, keeps it"
        require(self.matrix.dtype == torch.float64, "gram", allowed, self.matrix.dtype)

    @property
    def matrix(self) -> Tensor:
        """S: (m, m) float64."""
        return self.state["gram"]

    def on_its_device(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """Tensors from any devices."""
        return (t.to(self.matrix.device, non_blocking=True) for t in tensors)

    @property
    def following_slot(self) -> Tensor:
        """Of the gradient of the step to come: (1,) int64."""
        return (self.state["step"] % len(self.matrix)).view(1)

    def next_slot(self, finite: Tensor) -> Tensor:
        """Counts a step, and returns the slot of its gradient: (1,) int64."""
        slot = self.following_slot
        self.state["step"] += 1
        self.state["skipped_steps"] += ~finite
        return slot

    def replace(self, slot: Tensor, dots: Tensor) -> None:
        """Writes row and column `slot`.

        Args:
            slot: (1,) int64.
            dots: (m,) float64, inner products of all rows of the window with the new one.
        """
        self.matrix.index_copy_(0, slot, dots.unsqueeze(0))
        self.matrix.index_copy_(1, slot, dots.unsqueeze(1))

    def squared_norm(self, weights: Tensor) -> Tensor:
        """‖Gᵀw‖² = wᵀSw, () float64: the squared norm of an update at the price of a few m² operations."""
        return torch.dot(weights, self.matrix @ weights).clamp(min=0)
