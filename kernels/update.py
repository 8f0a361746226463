"""The weights and factors of `window_apply_`: how rows of the window become an update, and this a step."""

from typing import NamedTuple

from torch import Tensor


class Update(NamedTuple):
    """target ← target_factor · target + update_factor · u, with u = Σᵢ weightsᵢ · Gᵢ over the rows Gᵢ of a window.

    With momenta, momentum_factor · momentum is added to u: the dense part of a direction. Where `writes_momenta`,
    that sum also becomes the momentum: heavy ball. The tensors are floating point and on the targets' device: weights
    (m,), factors ().
    """

    weights: Tensor
    target_factor: Tensor
    update_factor: Tensor
    momentum_factor: Tensor | None = None  # with momenta, and only there
    writes_momenta: bool = False

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
