"""The tensors that `mfac_row_step_` reads and writes: the state of the Gram matrix and of M-FAC beside the window."""

from typing import NamedTuple

from torch import Tensor


class RowStep(NamedTuple):
    """All on one device and changed in place; `efcp.gram` and `efcp.preconditioners.mfac` say what they are."""

    gram: Tensor  # S, (m, m) float64
    inverse_root: Tensor  # R, (m, m) float64
    inverse_column: Tensor  # the column of RᵀR that belongs to the slot; afterwards that of the next slot: (m,) float64
    weights: Tensor  # (m,) float64
    factor: Tensor  # () float64, as the two below
    update_norm: Tensor
    inner_product: Tensor
    imprecise_steps: Tensor  # () int64, as all below
    step: Tensor
    skipped_steps: Tensor
    skipped_in_a_row: Tensor
