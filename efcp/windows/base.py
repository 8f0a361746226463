"""What a window is: the last m compressed gradients of one parameter, as the rows of G.

A compressor is a set of options, such as `TopK(density=0.01)`, that are the same for all parameters of a group. From
the state of one parameter, a dict of tensors, it makes a window, which knows how to take in a gradient, and how to do
the two things that preconditioning needs: inner products with the newest row, and a weighted sum of all rows.

A new compressor is a file beside this one with both classes.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from efcp.checkpoint import check_numbers


class Window(ABC):
    """The last m compressed gradients of one parameter of n elements; a view of tensors that live in its state."""

    @abstractmethod
    def push(self, grad: Tensor, slot: Tensor, finite: Tensor) -> Tensor:
        """Compresses a gradient into row `slot`, and returns the inner products of all rows with it.

        Args:
            grad: (n,) contiguous; never changed.
            slot: (1,) int64, on the gradient's device.
            finite: () bool, on the gradient's device; where false, the row becomes zero and all else stays as it was.

        Returns:
            (m,) float64.
        """

    @abstractmethod
    def clear(self, slot: Tensor) -> None:
        """Makes row `slot` zero."""

    @abstractmethod
    def apply_(self, target: Tensor, weights: Tensor, scale: Tensor) -> None:
        """target ← scale · target + Σᵢ weightsᵢ · Gᵢ.

        Args:
            target: (n,) contiguous, changed in place.
            weights: (m,) float64, on the target's device.
            scale: () float64, on the target's device.
        """


@dataclass(frozen=True)
class Compressor(ABC):
    """Options of a window. They become options of the param groups, where each group may have its own."""

    @property
    def options(self) -> dict[str, Any]:
        return asdict(self)

    @abstractmethod
    def allocate(self, param: Tensor, window: int) -> dict[str, Tensor]:
        """New state for a parameter: a window of zero rows, on the parameter's device.

        On the meta device this gives names, shapes and dtypes without the memory.
        """

    @abstractmethod
    def rows_name(self, param: Tensor) -> str:
        """The name of a tensor that is in the state of a parameter once that has a window."""

    def check(self, where: str, state: dict[str, Any], param: Tensor) -> None:
        """Raises ValueError unless a parameter's saved state, of the right names, shapes and dtypes, makes sense.

        Args:
            where: for messages.
        """
        check_numbers(where, state)

    @abstractmethod
    def bind(self, state: dict[str, Tensor], param: Tensor) -> Window:
        """The window of a parameter with this state."""
