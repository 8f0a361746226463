"""The weights and factors of `window_apply_`: how rows of the window become an update, and this a step."""

from typing import NamedTuple

from torch import Tensor


class Update(NamedTuple):
    """target ← target_factor · target + update_factor · u, with u = Σᵢ weightsᵢ · Gᵢ over the rows Gᵢ of a window.

    With momentum (heavy ball): momentum ← momentum_factor · momentum + u, and the new momentum takes the place of u in
    the formula above. All are floating point tensors on the targets' device: weights (m,), factors ().
    """

    weights: Tensor
    target_factor: Tensor
    update_factor: Tensor
    momentum_factor: Tensor | None = None  # None without momentum

    def factors(self, with_momenta: bool) -> dict[str, Tensor]:
        """The factors by name.

        Raises:
            ValueError: where there are momenta but no `momentum_factor`, or the other way round.
        """
        if (self.momentum_factor is not None) != with_momenta:
            allowed = "be a tensor where there are momenta" if with_momenta else "be None without momenta"
            raise ValueError(f"momentum_factor must {allowed}, got {self.momentum_factor!r}")
        factors = {"target_factor": self.target_factor, "update_factor": self.update_factor}
        return factors if self.momentum_factor is None else {**factors, "momentum_factor": self.momentum_factor}
