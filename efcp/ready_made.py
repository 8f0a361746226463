"""The named optimizers: `EFCP` with its parts chosen, and their options as arguments."""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from efcp.optimizer import EFCP
from efcp.preconditioners import GGT, MFAC
from efcp.windows import Identity, LowRank, TopK


class SparseMFAC(EFCP):
    """M-FAC over a window of sparse gradients. Arguments: see `EFCP`, `TopK` and `MFAC`."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        window: int = 1024,
        density: float = 0.01,
        damping: float = 1e-4,
        block_size: int = 4096,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        max_update_norm: float | None = None,
        value_dtype: torch.dtype = torch.bfloat16,
        error_dtype: torch.dtype | None = None,
        error_feedback: bool = True,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            TopK(density, block_size, value_dtype, error_dtype, error_feedback),
            MFAC(damping),
            window=window,
            momentum=momentum,
            weight_decay=weight_decay,
            max_update_norm=max_update_norm,
            maximize=maximize,
        )


class LowRankMFAC(EFCP):
    """M-FAC over a window of low-rank gradients. Arguments: see `EFCP`, `LowRank` and `MFAC`."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        window: int = 1024,
        rank: int = 4,
        power_iterations: int = 1,
        damping: float = 1e-4,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        max_update_norm: float | None = None,
        value_dtype: torch.dtype = torch.bfloat16,
        error_dtype: torch.dtype | None = None,
        error_feedback: bool = True,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            LowRank(rank, power_iterations, value_dtype, error_dtype, error_feedback),
            MFAC(damping),
            window=window,
            momentum=momentum,
            weight_decay=weight_decay,
            max_update_norm=max_update_norm,
            maximize=maximize,
        )


class DenseMFAC(EFCP):
    """M-FAC over a window of whole gradients: m times the parameters in memory. Arguments: see `EFCP` and `MFAC`."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        window: int = 1024,
        damping: float = 1e-4,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        max_update_norm: float | None = None,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            Identity(),
            MFAC(damping),
            window=window,
            momentum=momentum,
            weight_decay=weight_decay,
            max_update_norm=max_update_norm,
            maximize=maximize,
        )


class SparseGGT(EFCP):
    """Full-matrix Adagrad over a window of sparse gradients. Arguments: see `EFCP`, `TopK` and `GGT`."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        window: int = 100,
        density: float = 0.01,
        eps: float = 1e-5,
        beta1: float = 0.0,
        beta2: float = 1.0,
        refresh_every: int = 1,
        block_size: int = 4096,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        max_update_norm: float | None = None,
        value_dtype: torch.dtype = torch.bfloat16,
        error_dtype: torch.dtype | None = None,
        error_feedback: bool = True,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            TopK(density, block_size, value_dtype, error_dtype, error_feedback),
            GGT(eps, beta2, refresh_every),
            window=window,
            momentum=momentum,
            beta1=beta1,
            weight_decay=weight_decay,
            max_update_norm=max_update_norm,
            maximize=maximize,
        )


class LowRankGGT(EFCP):
    """Full-matrix Adagrad over a window of low-rank gradients. Arguments: see `EFCP`, `LowRank` and `GGT`."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        window: int = 100,
        rank: int = 4,
        power_iterations: int = 1,
        eps: float = 1e-5,
        beta1: float = 0.0,
        beta2: float = 1.0,
        refresh_every: int = 1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        max_update_norm: float | None = None,
        value_dtype: torch.dtype = torch.bfloat16,
        error_dtype: torch.dtype | None = None,
        error_feedback: bool = True,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            LowRank(rank, power_iterations, value_dtype, error_dtype, error_feedback),
            GGT(eps, beta2, refresh_every),
            window=window,
            momentum=momentum,
            beta1=beta1,
            weight_decay=weight_decay,
            max_update_norm=max_update_norm,
            maximize=maximize,
        )


class DenseGGT(EFCP):
    """Full-matrix Adagrad over a window of whole gradients. Arguments: see `EFCP` and `GGT`."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        window: int = 100,
        eps: float = 1e-5,
        beta1: float = 0.0,
        beta2: float = 1.0,
        refresh_every: int = 1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        max_update_norm: float | None = None,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            Identity(),
            GGT(eps, beta2, refresh_every),
            window=window,
            momentum=momentum,
            beta1=beta1,
            weight_decay=weight_decay,
            max_update_norm=max_update_norm,
            maximize=maximize,
        )
