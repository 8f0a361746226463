"""The interface of preconditioners: from the Gram matrix S of the window to the weights w of its rows.

The update is u = Gᵀ f(S) e_t, where e_t picks the newest row; `efcp.directions` has others. All work is on m × m
matrices in float64, whatever the model's size. A new preconditioner, in this package or outside, is a subclass of
`Preconditioner`; `examples/custom_preconditioner.py` is a complete one.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from efcp.checks import plain, require
from efcp.gram import Gram
from efcp.windows.base import Compressor, SingleWindow


@dataclass(frozen=True)
class Preconditioner(ABC):
    """Options of a preconditioner. They become options of the param groups, all of which must agree on them.

    A subclass is a frozen dataclass, its options are its fields, and `__post_init__` may check them. It is made anew
    from the options of the param groups in each step, so they are plain values that `torch.load` reads with
    weights_only. Their names must differ from those of `EFCP` and of the compressor.
    """

    fixed: ClassVar[tuple[str, ...]] = ()  # options that determine the state's shapes
    uses_gram: ClassVar[bool] = True  # whether anything here depends on S; where not, steps do not compute it

    @property
    def options(self) -> dict[str, Any]:
        """The options as plain values, so that param groups can be saved anywhere."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}

    @property
    def gives_length(self) -> bool:
        """Whether the length of an update Gᵀw follows from S and w."""
        return self.uses_gram and type(self).square_weights is Preconditioner.square_weights

    def allocate(self, window_size: int, device: torch.device) -> dict[str, Any]:
        """Allocates what the preconditioner keeps beside the Gram matrix, for a window of zero rows.

        Tensors on the device, and numbers that are never negative. The names of the Gram matrix's own state
        (`efcp.gram`) are taken, and so are version and those of the compressor's state.
        """
        return {}

    def check_compressor(self, compressor: Compressor) -> None:  # noqa: B027  (there may be nothing)
        """Raises TypeError where the preconditioner does not work with windows of a compressor."""

    def check_direction(self, direction: str) -> None:
        """Raises ValueError where the preconditioner cannot precondition what a direction says."""
        method = {"average": "weights_of_rows", "momentum": "weights_of_vector"}.get(direction)
        own = method is None or getattr(type(self), method) is not getattr(Preconditioner, method)
        require(own, "direction", f"not be {direction!r} with {type(self).__name__}, which has no {method}", direction)

    def step_along_row(
        self, gram: Gram, slot: Tensor, finite: Tensor, dots: Tensor, longest: float | None, length: float | None
    ) -> bool:
        """Does at once all that a step along the newest row does to `gram.state`, or nothing. Returns whether it did.

        That is `Gram.count_step`, `Gram.replace`, `weights`, and `Gram.record` of the update.

        Args:
            finite: () bool; where false, the update is zero.
            dots: (m,) float64, inner products of all rows of the window with the newest.
            longest: as `max_update_norm`.
            length: that the update is scaled to; None to leave it as it is.
        """
        return False

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

    def square_weights(self, gram: Gram, slot: Tensor) -> tuple[Tensor, Tensor] | None:
        """The weights v and the ε of second moments: u = Gᵀw / (√((G∘G)ᵀv) + ε), entry by entry. None for u = Gᵀw.

        Called after `weights`, with its arguments, and for diagnostics; changes nothing. Windows must have `squares`.

        Returns:
            v, (m,) float64, none negative; and ε, () float64, at least the smallest normal float32.
        """
        return None

    def weights_of_rows(self, gram: Gram, slot: Tensor, combination: Tensor) -> Tensor:
        """The weights w = f(S) α of the rows in the update Gᵀw, for a combination Gᵀα of the rows.

        Only needed for the direction "average"; called in place of `weights`, and with its arguments.

        Args:
            combination: α, (m,) float64.
        """
        raise NotImplementedError

    def weights_of_vector(self, gram: Gram, slot: Tensor, products: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """The factor γ and the weights w in the update γa + Gᵀw, for any vector a.

        Only needed for the direction "momentum"; called in place of `weights`, and with its arguments. For a function
        φ(GᵀG) of the window, such that Gᵀf(S) = φ(GᵀG)Gᵀ, γ = φ(0) and w = (φ(S) − φ(0)) S⁻¹ b.

        Args:
            products: b = Ga, (m,) float64.
            square: ‖a‖², () float64.

        Returns:
            γ, () float64, and w, (m,) float64; finite.
        """
        raise NotImplementedError

    def refresh(self, gram: Gram) -> None:  # noqa: B027  (there may be nothing)
        """Recomputes from the Gram matrix what is kept beside it: other rows than the newest may have changed."""


@dataclass(frozen=True)
class LocalPreconditioner(Preconditioner):
    """A metric that each parameter has by itself, for its dense momentum: the direction is "momentum".

    The Gram matrix is not needed. Each parameter's update gets the root mean square `update_rms`, which must be given.
    """

    uses_gram = False

    @abstractmethod
    def allocate_local(self, rows: dict[str, Tensor]) -> dict[str, Any]:
        """Allocates what is kept of a parameter: tensors, and numbers that are never negative.

        Args:
            rows: what the compressor has allocated for it.
        """

    @abstractmethod
    def metrics(self, windows: Sequence[SingleWindow], states: Sequence[dict[str, Any]], slot: Tensor) -> list[Tensor]:
        """The metric of each parameter, once in a step.

        Args:
            windows: of each parameter, with the newest row.
            states: of each parameter; what `allocate_local` has given may be changed.
            slot: (1,) int64, the newest row.
        """

    @abstractmethod
    def update(self, window: SingleWindow, metrics: Tensor, vector: Tensor) -> Tensor:
        """The update of a parameter along a vector, up to a factor: (n,).

        Args:
            metrics: of the parameter, from `metrics`.
            vector: (n,), never changed.
        """

    def update_all(self, windows: Sequence[Any], metrics: Sequence[Tensor], vectors: Tensor) -> Tensor:
        """The updates of p parameters whose windows are of one kind and size: (p, n).

        Args:
            metrics: of each parameter, from `metrics`.
            vectors: (p, n), never changed.
        """
        return torch.stack([self.update(*own) for own in zip(windows, metrics, vectors, strict=True)])

    def weights(self, gram: Gram, slot: Tensor) -> Tensor:
        raise NotImplementedError

    def check_direction(self, direction: str) -> None:
        require(direction == "momentum", "direction", f"be 'momentum' with {type(self).__name__}", direction)
