"""What a preconditioner is: from the Gram matrix S of the window to the weights w of its rows.

The update is u = Gᵀ f(S) e_t, where e_t picks the newest row. All work is on m × m matrices in float64, whatever the
model's size. A new preconditioner is a file beside this one, or a class of the user's.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from efcp.gram import Gram


@dataclass(frozen=True)
class Preconditioner(ABC):
    """Options of a preconditioner. They become options of the param groups, all of which must agree on them."""

    fixed: ClassVar[tuple[str, ...]] = ()  # options of which the shapes of the state depend

    @property
    def options(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @abstractmethod
    def allocate(self, window: int, device: torch.device) -> dict[str, Any]:
        """New state, for a window of zero rows: what it derives from the Gram matrix and keeps beside it."""

    @abstractmethod
    def weights(self, gram: Gram, slot: Tensor) -> Tensor:
        """The weights w = f(S) e_t.

        Args:
            gram: the Gram matrix. Since the last call its row and column `slot` have changed, and nothing else.
            slot: (1,) int64, the newest row.

        Returns:
            (m,) float64.
        """

    def refresh(self, gram: Gram) -> None:  # noqa: B027  (there may be nothing)
        """Derives anew from the Gram matrix what is kept beside it."""
