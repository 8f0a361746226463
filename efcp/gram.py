"""The Gram matrix S = G Gᵀ of the whole window, as a ring buffer.

Row and column `slot` belong to the gradient that was written there last; slots are filled in turn. A step replaces one
row of the window, hence one row and column of S. State:

    step               ()      int64    gradients taken in so far
    skipped_steps      ()      int64    how many of these had an Inf or NaN
    skipped_in_a_row   ()      int64    how many in a row, up to the latest
    gram               (m, m)  float64  S; zero where the preconditioner does not use it
    weights            (m,)    float64  w of the newest update, Gᵀw + factor · momentum; zero after a skipped step
    factor             ()      float64  see `efcp.directions`
    update_norm        ()      float64  the length ‖u‖ of that update, where S gives it
    inner_product      ()      float64  ⟨c, u⟩, with c the newest row, where S gives it
    pending            bool             from when a step starts to change windows until it ends; S is unknown meanwhile
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efcp.checks import check_content, check_numbers, require
from efcp.kernels import is_fake

OF_UPDATE = ("factor", "update_norm", "inner_product")
ROUNDING = 1e-9  # of the inner product of two rows, in their lengths: sums in another order differ by less


def allocate_gram(window_size: int, device: torch.device) -> dict[str, Any]:
    """The state of a Gram matrix of a window of zero rows."""
    counters = ("step", "skipped_steps", "skipped_in_a_row")
    return {
        **{name: torch.zeros((), dtype=torch.int64, device=device) for name in counters},
        "gram": torch.zeros(window_size, window_size, dtype=torch.float64, device=device),
        "weights": torch.zeros(window_size, dtype=torch.float64, device=device),
        **{name: torch.zeros((), dtype=torch.float64, device=device) for name in OF_UPDATE},
        "pending": False,
    }


def check_gram(where: str, state: dict[str, Any]) -> None:
    """Raises ValueError unless a saved state of the right names, shapes and dtypes makes sense."""
    check_numbers(where, state)
    # A step that broke off can have written a row and not its column; the next one computes all.
    symmetric = state["pending"] or torch.equal(state["gram"], state["gram"].t())
    check_content(where, "gram", symmetric, "be symmetric")
    counted = 0 <= int(state["skipped_in_a_row"]) <= int(state["skipped_steps"]) <= int(state["step"])
    check_content(where, "step", counted, "not be negative, nor less than skipped_steps")


@dataclass(frozen=True)
class Gram:
    """The Gram matrix in a state that also holds what preconditioners derive from it.

    Args:
        state: see above.
        rounding: the machine epsilon of the arithmetic in which weighted sums of the window's rows are formed.
    """

    state: dict[str, Any]
    rounding: float = torch.finfo(torch.float64).eps

    def __post_init__(self) -> None:
        # Wrappers that load a state by themselves, through torch.optim.Optimizer, cast it to the parameters' dtype.
        allowed = "stay torch.float64, as the optimizer's own load_state_dict, not that of a wrapper, keeps it"
        require(self.matrix.dtype == torch.float64, "gram", allowed, self.matrix.dtype)

    @property
    def matrix(self) -> Tensor:
        """S: (m, m) float64."""
        return self.state["gram"]

    def on_its_device(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """Moves tensors from any devices to that of S."""
        return (t.to(self.matrix.device, non_blocking=True) for t in tensors)

    @property
    def following_slot(self) -> Tensor:
        """The slot that the next step will write: (1,) int64."""
        return (self.state["step"] % len(self.matrix)).view(1)

    def ages(self, slot: Tensor) -> Tensor:
        """How many steps each row is older than that of a slot, (1,) int64: (m,) int64."""
        return (slot - torch.arange(len(self.matrix), device=slot.device)) % len(self.matrix)

    def count_step(self, finite: Tensor) -> None:
        """Counts a step, or a skipped one where not finite, () bool."""
        state = self.state
        state["step"] += 1
        state["skipped_steps"] += ~finite
        in_a_row = state["skipped_in_a_row"]
        in_a_row.copy_((in_a_row + 1) * ~finite)  # at once: never more than skipped_steps, wherever a step breaks off

    def replace(self, slot: Tensor, dots: Tensor) -> None:
        """Writes row and column `slot`.

        Args:
            slot: (1,) int64.
            dots: (m,) float64, inner products of all rows of the window with the new one.
        """
        self.matrix.index_copy_(0, slot, dots.unsqueeze(0))
        self.matrix.index_copy_(1, slot, dots.unsqueeze(1))

    def recompute(self, dots: Callable[[Tensor], Tensor]) -> None:
        """Computes S from the window, from the oldest row to the newest, as steps would have done.

        Args:
            dots: gives the inner products of all rows with row `slot`, (m,) float64.
        """
        for age in range(len(self.matrix)):
            slot = (self.following_slot + age) % len(self.matrix)
            self.replace(slot, dots(slot))

    def agrees_with(self, other: Tensor) -> bool:
        """Whether S is another Gram matrix, (m, m) float64, up to rounding. Waits for the device."""
        lengths = self.matrix.diagonal().sqrt()
        return bool(((self.matrix - other).abs() <= ROUNDING * torch.outer(lengths, lengths)).all())

    def record(self, weights: Tensor, factor: Tensor, squared_norm: Tensor, inner: Tensor) -> None:
        """Keeps the newest update, for diagnostics: see `efcp.directions.Combination`."""
        self.state["weights"].copy_(weights)
        for name, value in zip(OF_UPDATE, (factor, squared_norm.sqrt(), inner), strict=True):
            self.state[name].copy_(value)

    def mean_square(self) -> Tensor:
        """The mean squared length of the rows held, () float64: of those that are not zero; 1 where all are."""
        diagonal = self.matrix.diagonal()
        mean = diagonal.sum() / (diagonal > 0).sum().clamp(min=1)
        return torch.where(mean > 0, mean, 1.0)


def is_on_cpu(tensor: Tensor) -> bool:
    """Whether the host can read a number of a tensor without waiting for a device."""
    return tensor.is_cpu and not is_fake(tensor)
