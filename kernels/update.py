"""The weights and factors of `window_apply_`: how rows of the window become an update, and this a step."""

from typing import NamedTuple

from torch import Tensor


class Update(NamedTuple):
    """target ← target_factor · target + update_factor · u, with u = Σᵢ weightsᵢ · Gᵢ over the rows Gᵢ of a window.

    With square_weights, each entry of u is divided by √(Σᵢ square_weightsᵢ · Gᵢ²) + eps: Adam's second moments. With
    eps > 0, entries that are in no row stay 0.

    With momenta, momentum_factor · momentum is added to u: the dense part of a direction. Where `writes_momenta`,
    that sum also becomes the momentum: heavy ball. The tensors are floating point and on the targets' device: weights
    (m,), all others ().
    """

    weights: Tensor
    target_factor: Tensor
    update_factor: Tensor
    momentum_factor: Tensor | None = None  # with momenta, and only there
    writes_momenta: bool = False
    square_weights: Tensor | None = None  # (m,), none negative
    eps: Tensor | None = None  # with square_weights, and only there

    def factors(self, with_momenta: bool) -> dict[str, Tensor]:
        """The tensors of one element by name.

        Raises:
            ValueError: where there are momenta but no `momentum_factor`, or square_weights but no `eps`; or the other
                way round.
        """
        if (self.momentum_factor is not None) != with_momenta:
            allowed = "be a tensor where there are momenta" if with_momenta else "be None without momenta"
            raise ValueError(f"momentum_factor must {allowed}, got {self.momentum_factor!r}")
        if (self.eps is None) != (self.square_weights is None):
            allowed = "be a tensor with square_weights" if self.eps is None else "be None without square_weights"
            raise ValueError(f"eps must {allowed}, got {self.eps!r}")
        names = ("target_factor", "update_factor", "momentum_factor", "eps")
        return {name: factor for name in names if (factor := getattr(self, name)) is not None}
