"""What a window is: the last m compressed gradients of some parameters, as the rows of G.

A compressor is a set of options, such as `TopK(density=0.01)`, that are the same for all parameters of a group. From
their states, dicts of tensors, it makes a window, which knows how to take in gradients, and how to do the two things
that preconditioning needs: inner products with the newest row, and a weighted sum of all rows.

A new compressor is a file beside this one with both classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from efcp.checkpoint import check_numbers


class Window(ABC):
    """The last m compressed gradients of parameters that are stepped together; a view of tensors in their states."""

    @abstractmethod
    def push(self, grads: Sequence[Tensor | None], slot: Tensor, finite: Tensor) -> Tensor:
        """Compresses gradients into row `slot`, and returns the inner products of all rows with it.

        Args:
            grads: of each parameter (n,) contiguous, never changed; None makes its part of the row zero.
            slot: (1,) int64, on the gradients' device.
            finite: () bool, on the gradients' device; where false, the row becomes zero and all else stays as it was.

        Returns:
            (m,) float64, summed over the parameters.
        """

    @abstractmethod
    def apply_(
        self,
        targets: Sequence[Tensor | None],
        momenta: Sequence[Tensor],
        weights: Tensor,
        scale: Tensor,
        step: Tensor,
        decay: Tensor,
    ) -> None:
        """target ← scale · target + step · u with u = Σᵢ weightsᵢ · Gᵢ; with momentum ← decay · momentum + u for u.

        Args:
            targets: of each parameter (n,) contiguous, changed in place; None stays as it is.
            momenta: of each parameter (n,), changed in place where the target is; empty for none.
            weights: (m,) float64, on the targets' device.
            scale, step, decay: () float64, on the targets' device.
        """


class SingleWindow(ABC):
    """The same of one parameter of n elements."""

    @abstractmethod
    def __len__(self) -> int:
        """m."""

    @abstractmethod
    def push(self, grad: Tensor, slot: Tensor, finite: Tensor) -> Tensor:
        """As `Window.push`, with a gradient."""

    @abstractmethod
    def clear(self, slot: Tensor) -> None:
        """Makes row `slot` zero."""

    @abstractmethod
    def apply_(self, target: Tensor, weights: Tensor, scale: Tensor) -> None:
        """target ← scale · target + Σᵢ weightsᵢ · Gᵢ."""


@dataclass(frozen=True)
class Separate(Window):
    """Windows of several parameters, each treated by itself."""

    windows: list[SingleWindow]

    def push(self, grads: Sequence[Tensor | None], slot: Tensor, finite: Tensor) -> Tensor:
        dots = torch.zeros(len(self.windows[0]), dtype=torch.float64, device=slot.device)
        for window, grad in zip(self.windows, grads, strict=True):
            if grad is None:
                window.clear(slot)
            else:
                dots += window.push(grad, slot, finite)
        return dots

    def apply_(
        self,
        targets: Sequence[Tensor | None],
        momenta: Sequence[Tensor],
        weights: Tensor,
        scale: Tensor,
        step: Tensor,
        decay: Tensor,
    ) -> None:
        for number, (window, target) in enumerate(zip(self.windows, targets, strict=True)):
            if target is None:
                continue
            if momenta:
                window.apply_(momenta[number], weights, decay)
                target.mul_(scale).addcmul_(momenta[number], step)
            else:
                window.apply_(target, step * weights, scale)


@dataclass(frozen=True)
class Compressor(ABC):
    """Options of a window. They become options of the param groups, where each group may have its own."""

    names: ClassVar[tuple[str, ...]]  # of all tensors that `allocate` may make

    @property
    def options(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

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
    def bind(self, states: Sequence[dict[str, Tensor]], params: Sequence[Tensor]) -> Window:
        """The window of parameters with these states."""
