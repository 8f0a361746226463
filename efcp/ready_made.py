"""The named optimizers: `EFCP` with its parts chosen, and their options as arguments."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from efcp.optimizer import EFCP
from efcp.preconditioners import GGT, MFAC, AdamStats, Kronecker
from efcp.windows import Identity, LowRank, TopK

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class SparseMFAC(EFCP):
    """M-FAC over a window of sparse gradients: the optimizer to begin with (EFCP, arXiv 2306.06098).

    A step, with the gradient g:

        c = Top-k(e + g),  e ← e + g − c    keeps the largest entries in each block of the gradient g
        u = (λI + GᵀG/m)⁻¹ c                preconditions with the last m of these, the rows of G
        θ ← (1 − lr · weight_decay) θ − lr · u

    State, with the default dtypes and block size: 4 · window · density bytes for the window and 4 for the error e, per
    parameter. `efcp.estimate_memory(model, SparseMFAC, window=64)` says what that comes to, momentum included.

    Args:
        params: what to optimise: parameters, named parameters, or param groups. Real floating point, on any devices.
        lr: learning rate, ≥ 0: a float or a tensor of one element. Not on Adam's scale: start from 1.3 / window, which
            the default is. With more damping it may be larger.
        window: m, how many gradients are kept, ≥ 1. Memory grows with window · density. Fixed from the first step on.
        density: the share of entries kept of each gradient, in (0, 1]: ceil(density · L) of a block of L entries. Fixed
            from the first step on.
        damping: λ > 0, in the units of a squared gradient. The larger it is, the more the step resembles SGD's. Start
            from 1e-3, and try more first; below 1e-6 of the squared gradient norm, rounding spoils float32 steps.
        relative_damping: whether λ is relative to the gradients: then λ · window = damping · (the mean squared length
            of the rows), which means the same for every loss and window. Start from 0.1. Fixed from the first step on.
        block_size: entries of a block, an integer from 1 to 32768. Positions take one byte up to 256, two above. Fixed
            from the first step on.
        direction: what is preconditioned. "row": the newest row c, as in the papers. "average": the mean of the rows
            held, weighted momentum^age; it takes no memory. "momentum": a dense a ← momentum · a + (1 − momentum) · g,
            which takes a tensor as large as each parameter (`momentum_dtype`). Fixed from the first step on.
        momentum: in [0, 1). With direction "row" it is that of the update: v ← momentum · v + u, and the step goes
            along v; above 0 this takes a tensor as large as each parameter.
        weight_decay: ≥ 0, decoupled from the gradient as in AdamW: parameters shrink by the factor 1 − lr ·
            weight_decay.
        update_rms: > 0: u is scaled so that the root mean square of its entries is this, taken over all parameters that
            have a gradient. With 0.2, the size of Adam's updates, a learning rate that is good for AdamW is a good
            start. None leaves u as it is.
        max_update_norm: > 0: a longer update u is scaled down to this norm, taken over all parameters. None sets no
            limit.
        momentum_dtype: of the momentum: floating point; or torch.int8 with direction "momentum", 1.06 bytes an entry.
            None takes the parameter's. Fixed from the first step on.
        value_dtype: of the kept entries: torch.bfloat16 or torch.float32.
        error_dtype: of the error e: torch.bfloat16, torch.float32 or torch.float64; torch.int8 or torch.int4, 1.06 or
            0.53 bytes an entry. None takes float64 for float64 parameters, and float32 for all others.
        error_feedback: whether what is left out of one gradient is added to the next. Without it there is no error to
            keep, which saves 4 bytes a parameter. Accuracy was lower wherever we tried it (analysis/README.md).
        maximize: climb the objective instead of descending it.
        aligned: cut parameters into the blocks that sharded ones have, so that checkpoints of one process and of
            several can be exchanged. None: sharded parameters alone. Fixed from the first step on.
        mesh: a DeviceMesh of one dimension whose ranks have the same parameters and gradients, as with
            `DistributedDataParallel`: each keeps its share of the state. DTensors, of `fully_shard`, need none.

    Raises:
        ValueError: for values that are not allowed.
        TypeError: for parameters that are not real floating point.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        *,
        window: int = 64,
        density: float = 0.01,
        damping: float = 1e-3,
        relative_damping: bool = False,
        block_size: int = 4096,
        direction: str = "row",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        update_rms: float | None = None,
        max_update_norm: float | None = None,
        momentum_dtype: torch.dtype | None = None,
        value_dtype: torch.dtype = torch.bfloat16,
        error_dtype: torch.dtype | None = None,
        error_feedback: bool = True,
        maximize: bool = False,
        aligned: bool | None = None,
        mesh: "DeviceMesh | None" = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            TopK(density, block_size, value_dtype, error_dtype, error_feedback, aligned),
            MFAC(damping, relative_damping),
            window=window,
            direction=direction,
            momentum=momentum,
            weight_decay=weight_decay,
            update_rms=update_rms,
            max_update_norm=max_update_norm,
            momentum_dtype=momentum_dtype,
            maximize=maximize,
            mesh=mesh,
        )


class LowRankMFAC(EFCP):
    """M-FAC over a window of low-rank gradients (EFCP, arXiv 2306.06098; PowerSGD, arXiv 1905.13727).

    A step, with the gradient g:

        c = P Qᵀ ≈ e + g,  e ← e + g − c    keeps a rank-r approximation of each gradient matrix g
        u = (λI + GᵀG/m)⁻¹ c                preconditions with the last m of these, the rows of G
        θ ← (1 − lr · weight_decay) θ − lr · u

    P and Q come from power iterations that start where those of the last step ended. State, of a matrix of R × C
    entries with the default dtypes: 2 · window · rank · (R + C) bytes for the window, and 4 · R · C for the error e.
    Vectors, and matrices whose factors would be no smaller, are kept whole: 4 · window bytes a float32 entry.

    Args:
        params: what to optimise: parameters, named parameters, or param groups. Real floating point, on any devices.
        lr: learning rate, ≥ 0: a float or a tensor of one element. Not on Adam's scale: start from 1.3 / window, which
            the default is. With more damping it may be larger.
        window: m, how many gradients are kept, ≥ 1. Memory grows with window · rank. Fixed from the first step on.
        rank: r, the rank of what is kept of a gradient matrix, ≥ 1. Fixed from the first step on.
        power_iterations: of each step, ≥ 1. More come closer to the best approximation of that rank, and take no
            memory. Fixed from the first step on.
        damping: λ > 0, in the units of a squared gradient. The larger it is, the more the step resembles SGD's. Start
            from 1e-3, and try more first; below 1e-6 of the squared gradient norm, rounding spoils float32 steps.
        relative_damping: whether λ is relative to the gradients: then λ · window = damping · (the mean squared length
            of the rows), which means the same for every loss and window. Start from 0.1. Fixed from the first step on.
        direction: what is preconditioned. "row": the newest row c, as in the papers. "average": the mean of the rows
            held, weighted momentum^age; it takes no memory. "momentum": a dense a ← momentum · a + (1 − momentum) · g,
            which takes a tensor as large as each parameter (`momentum_dtype`). Fixed from the first step on.
        momentum: in [0, 1). With direction "row" it is that of the update: v ← momentum · v + u, and the step goes
            along v; above 0 this takes a tensor as large as each parameter.
        weight_decay: ≥ 0, decoupled from the gradient as in AdamW: parameters shrink by the factor 1 − lr ·
            weight_decay.
        update_rms: > 0: u is scaled so that the root mean square of its entries is this, taken over all parameters that
            have a gradient. With 0.2, the size of Adam's updates, a learning rate that is good for AdamW is a good
            start. None leaves u as it is.
        max_update_norm: > 0: a longer update u is scaled down to this norm, taken over all parameters. None sets no
            limit.
        momentum_dtype: of the momentum: floating point; or torch.int8 with direction "momentum", 1.06 bytes an entry.
            None takes the parameter's. Fixed from the first step on.
        value_dtype: of the kept factors: torch.bfloat16 or torch.float32.
        error_dtype: of the error e: torch.bfloat16, torch.float32 or torch.float64; torch.int8 or torch.int4, 1.06 or
            0.53 bytes an entry. None takes float64 for float64 parameters, and float32 for all others.
        error_feedback: whether what is left out of one gradient is added to the next. Without it there is no error to
            keep, which saves 4 bytes a parameter. Accuracy was lower wherever we tried it (analysis/README.md).
        maximize: climb the objective instead of descending it.
        mesh: a DeviceMesh of one dimension whose ranks have the same parameters and gradients, as with
            `DistributedDataParallel`: each keeps its share of the state. DTensors, of `fully_shard`, need none.

    Raises:
        ValueError: for values that are not allowed.
        TypeError: for parameters that are not real floating point.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        *,
        window: int = 64,
        rank: int = 4,
        power_iterations: int = 1,
        damping: float = 1e-3,
        relative_damping: bool = False,
        direction: str = "row",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        update_rms: float | None = None,
        max_update_norm: float | None = None,
        momentum_dtype: torch.dtype | None = None,
        value_dtype: torch.dtype = torch.bfloat16,
        error_dtype: torch.dtype | None = None,
        error_feedback: bool = True,
        maximize: bool = False,
        mesh: "DeviceMesh | None" = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            LowRank(rank, power_iterations, value_dtype, error_dtype, error_feedback),
            MFAC(damping, relative_damping),
            window=window,
            direction=direction,
            momentum=momentum,
            weight_decay=weight_decay,
            update_rms=update_rms,
            max_update_norm=max_update_norm,
            momentum_dtype=momentum_dtype,
            maximize=maximize,
            mesh=mesh,
        )


class DenseMFAC(EFCP):
    """M-FAC over a window of whole gradients (arXiv 2107.03356): what the others approximate.

    A step, with the gradient g:

        c = g                               keeps the gradient g
        u = (λI + GᵀG/m)⁻¹ c                preconditions with the last m of these, the rows of G
        θ ← (1 − lr · weight_decay) θ − lr · u

    State: `window` times the memory of the parameters.

    Args:
        params: what to optimise: parameters, named parameters, or param groups. Real floating point, on any devices.
        lr: learning rate, ≥ 0: a float or a tensor of one element. Not on Adam's scale: start from 1.3 / window, which
            the default is. With more damping it may be larger.
        window: m, how many gradients are kept, ≥ 1. Each takes as much memory as the parameters. Fixed from the first
            step on.
        damping: λ > 0, in the units of a squared gradient. The larger it is, the more the step resembles SGD's. Start
            from 1e-3, and try more first; below 1e-6 of the squared gradient norm, rounding spoils float32 steps.
        relative_damping: whether λ is relative to the gradients: then λ · window = damping · (the mean squared length
            of the rows), which means the same for every loss and window. Start from 0.1. Fixed from the first step on.
        direction: what is preconditioned. "row": the newest row c, as in the papers. "average": the mean of the rows
            held, weighted momentum^age; it takes no memory. "momentum": a dense a ← momentum · a + (1 − momentum) · g,
            which takes a tensor as large as each parameter (`momentum_dtype`). Fixed from the first step on.
        momentum: in [0, 1). With direction "row" it is that of the update: v ← momentum · v + u, and the step goes
            along v; above 0 this takes a tensor as large as each parameter.
        weight_decay: ≥ 0, decoupled from the gradient as in AdamW: parameters shrink by the factor 1 − lr ·
            weight_decay.
        update_rms: > 0: u is scaled so that the root mean square of its entries is this, taken over all parameters that
            have a gradient. With 0.2, the size of Adam's updates, a learning rate that is good for AdamW is a good
            start. None leaves u as it is.
        max_update_norm: > 0: a longer update u is scaled down to this norm, taken over all parameters. None sets no
            limit.
        momentum_dtype: of the momentum: floating point; or torch.int8 with direction "momentum", 1.06 bytes an entry.
            None takes the parameter's. Fixed from the first step on.
        maximize: climb the objective instead of descending it.
        mesh: a DeviceMesh of one dimension whose ranks have the same parameters and gradients, as with
            `DistributedDataParallel`: each keeps its share of the state. DTensors, of `fully_shard`, need none.

    Raises:
        ValueError: for values that are not allowed.
        TypeError: for parameters that are not real floating point.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        *,
        window: int = 128,
        damping: float = 1e-3,
        relative_damping: bool = False,
        direction: str = "row",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        update_rms: float | None = None,
        max_update_norm: float | None = None,
        momentum_dtype: torch.dtype | None = None,
        maximize: bool = False,
        mesh: "DeviceMesh | None" = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            Identity(),
            MFAC(damping, relative_damping),
            window=window,
            direction=direction,
            momentum=momentum,
            weight_decay=weight_decay,
            update_rms=update_rms,
            max_update_norm=max_update_norm,
            momentum_dtype=momentum_dtype,
            maximize=maximize,
            mesh=mesh,
        )


class SparseGGT(EFCP):
    """Full-matrix Adagrad over a window of sparse gradients (GGT, arXiv 1806.02958; EFCP, arXiv 2306.06098).

    A step, with the gradient g:

        c = Top-k(e + g),  e ← e + g − c    keeps the largest entries in each block of the gradient g
        u = [√(GᵀG) + εI]⁻¹ c               preconditions with the last m of these, the rows of G
        θ ← (1 − lr · weight_decay) θ − lr · u

    Updates u are never longer than 1. State, with the default dtypes and block size: 4 · window · density bytes for the
    window and 4 for the error e, per parameter.

    Args:
        params: what to optimise: parameters, named parameters, or param groups. Real floating point, on any devices.
        lr: learning rate, ≥ 0: a float or a tensor of one element. Not on Adam's scale: updates u are never longer than
            1. SparseGGT wanted 0.3 to 1 in our experiments.
        window: m, how many gradients are kept, ≥ 1. Memory grows with window · density. Fixed from the first step on.
        density: the share of entries kept of each gradient, in (0, 1]: ceil(density · L) of a block of L entries. Fixed
            from the first step on.
        eps: ε > 0, in the units of a gradient; added to the square root of the Gram matrix.
        relative_eps: whether ε is relative to the gradients: times the root mean square of the rows' lengths. Start
            from 0.1.
        beta1: in [0, 1): the average a ← beta1 · a + (1 − beta1) · g is compressed in place of the gradient g. Above 0
            it takes a tensor as large as each parameter.
        beta2: in (0, 1]: a row of the window counts beta2^age. 1 counts all rows alike.
        refresh_every: steps from one eigendecomposition of the Gram matrix to the next, ≥ 1. The weights stay the same
            up to rounding. It saves time for windows of some hundreds of rows. Fixed from the first step on.
        block_size: entries of a block, an integer from 1 to 32768. Positions take one byte up to 256, two above. Fixed
            from the first step on.
        direction: what is preconditioned. "row": the newest row c, as in the papers. "average": the mean of the rows
            held, weighted momentum^age; it takes no memory. "momentum": a dense a ← momentum · a + (1 − momentum) · g,
            which takes a tensor as large as each parameter (`momentum_dtype`). Fixed from the first step on.
        momentum: in [0, 1). With direction "row" it is that of the update: v ← momentum · v + u, and the step goes
            along v; above 0 this takes a tensor as large as each parameter.
        weight_decay: ≥ 0, decoupled from the gradient as in AdamW: parameters shrink by the factor 1 − lr ·
            weight_decay.
        update_rms: > 0: u is scaled so that the root mean square of its entries is this, taken over all parameters that
            have a gradient. With 0.2, the size of Adam's updates, a learning rate that is good for AdamW is a good
            start. None leaves u as it is.
        max_update_norm: > 0: a longer update u is scaled down to this norm, taken over all parameters. None sets no
            limit.
        momentum_dtype: of the momentum: floating point; or torch.int8 with direction "momentum", 1.06 bytes an entry.
            None takes the parameter's. Fixed from the first step on.
        value_dtype: of the kept entries: torch.bfloat16 or torch.float32.
        error_dtype: of the error e: torch.bfloat16, torch.float32 or torch.float64; torch.int8 or torch.int4, 1.06 or
            0.53 bytes an entry. None takes float64 for float64 parameters, and float32 for all others.
        error_feedback: whether what is left out of one gradient is added to the next. Without it there is no error to
            keep, which saves 4 bytes a parameter. Accuracy was lower wherever we tried it (analysis/README.md).
        maximize: climb the objective instead of descending it.
        aligned: cut parameters into the blocks that sharded ones have, so that checkpoints of one process and of
            several can be exchanged. None: sharded parameters alone. Fixed from the first step on.
        mesh: a DeviceMesh of one dimension whose ranks have the same parameters and gradients, as with
            `DistributedDataParallel`: each keeps its share of the state. DTensors, of `fully_shard`, need none.

    Raises:
        ValueError: for values that are not allowed.
        TypeError: for parameters that are not real floating point.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.3,
        *,
        window: int = 100,
        density: float = 0.01,
        eps: float = 1e-5,
        relative_eps: bool = False,
        beta1: float = 0.0,
        beta2: float = 1.0,
        refresh_every: int = 1,
        block_size: int = 4096,
        direction: str = "row",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        update_rms: float | None = None,
        max_update_norm: float | None = None,
        momentum_dtype: torch.dtype | None = None,
        value_dtype: torch.dtype = torch.bfloat16,
        error_dtype: torch.dtype | None = None,
        error_feedback: bool = True,
        maximize: bool = False,
        aligned: bool | None = None,
        mesh: "DeviceMesh | None" = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            TopK(density, block_size, value_dtype, error_dtype, error_feedback, aligned),
            GGT(eps, beta2, refresh_every, relative_eps),
            window=window,
            direction=direction,
            momentum=momentum,
            beta1=beta1,
            weight_decay=weight_decay,
            update_rms=update_rms,
            max_update_norm=max_update_norm,
            momentum_dtype=momentum_dtype,
            maximize=maximize,
            mesh=mesh,
        )


class LowRankGGT(EFCP):
    """Full-matrix Adagrad over a window of low-rank gradients (GGT, arXiv 1806.02958; EFCP, arXiv 2306.06098).

    A step, with the gradient g:

        c = P Qᵀ ≈ e + g,  e ← e + g − c    keeps a rank-r approximation of each gradient matrix g
        u = [√(GᵀG) + εI]⁻¹ c               preconditions with the last m of these, the rows of G
        θ ← (1 − lr · weight_decay) θ − lr · u

    Updates u are never longer than 1. State: as that of `LowRankMFAC`.

    Args:
        params: what to optimise: parameters, named parameters, or param groups. Real floating point, on any devices.
        lr: learning rate, ≥ 0: a float or a tensor of one element. Not on Adam's scale: updates u are never longer than
            1. SparseGGT wanted 0.3 to 1 in our experiments.
        window: m, how many gradients are kept, ≥ 1. Memory grows with window · rank. Fixed from the first step on.
        rank: r, the rank of what is kept of a gradient matrix, ≥ 1. Fixed from the first step on.
        power_iterations: of each step, ≥ 1. More come closer to the best approximation of that rank, and take no
            memory. Fixed from the first step on.
        eps: ε > 0, in the units of a gradient; added to the square root of the Gram matrix.
        relative_eps: whether ε is relative to the gradients: times the root mean square of the rows' lengths. Start
            from 0.1.
        beta1: in [0, 1): the average a ← beta1 · a + (1 − beta1) · g is compressed in place of the gradient g. Above 0
            it takes a tensor as large as each parameter.
        beta2: in (0, 1]: a row of the window counts beta2^age. 1 counts all rows alike.
        refresh_every: steps from one eigendecomposition of the Gram matrix to the next, ≥ 1. The weights stay the same
            up to rounding. It saves time for windows of some hundreds of rows. Fixed from the first step on.
        direction: what is preconditioned. "row": the newest row c, as in the papers. "average": the mean of the rows
            held, weighted momentum^age; it takes no memory. "momentum": a dense a ← momentum · a + (1 − momentum) · g,
            which takes a tensor as large as each parameter (`momentum_dtype`). Fixed from the first step on.
        momentum: in [0, 1). With direction "row" it is that of the update: v ← momentum · v + u, and the step goes
            along v; above 0 this takes a tensor as large as each parameter.
        weight_decay: ≥ 0, decoupled from the gradient as in AdamW: parameters shrink by the factor 1 − lr ·
            weight_decay.
        update_rms: > 0: u is scaled so that the root mean square of its entries is this, taken over all parameters that
            have a gradient. With 0.2, the size of Adam's updates, a learning rate that is good for AdamW is a good
            start. None leaves u as it is.
        max_update_norm: > 0: a longer update u is scaled down to this norm, taken over all parameters. None sets no
            limit.
        momentum_dtype: of the momentum: floating point; or torch.int8 with direction "momentum", 1.06 bytes an entry.
            None takes the parameter's. Fixed from the first step on.
        value_dtype: of the kept factors: torch.bfloat16 or torch.float32.
        error_dtype: of the error e: torch.bfloat16, torch.float32 or torch.float64; torch.int8 or torch.int4, 1.06 or
            0.53 bytes an entry. None takes float64 for float64 parameters, and float32 for all others.
        error_feedback: whether what is left out of one gradient is added to the next. Without it there is no error to
            keep, which saves 4 bytes a parameter. Accuracy was lower wherever we tried it (analysis/README.md).
        maximize: climb the objective instead of descending it.
        mesh: a DeviceMesh of one dimension whose ranks have the same parameters and gradients, as with
            `DistributedDataParallel`: each keeps its share of the state. DTensors, of `fully_shard`, need none.

    Raises:
        ValueError: for values that are not allowed.
        TypeError: for parameters that are not real floating point.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.3,
        *,
        window: int = 100,
        rank: int = 4,
        power_iterations: int = 1,
        eps: float = 1e-5,
        relative_eps: bool = False,
        beta1: float = 0.0,
        beta2: float = 1.0,
        refresh_every: int = 1,
        direction: str = "row",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        update_rms: float | None = None,
        max_update_norm: float | None = None,
        momentum_dtype: torch.dtype | None = None,
        value_dtype: torch.dtype = torch.bfloat16,
        error_dtype: torch.dtype | None = None,
        error_feedback: bool = True,
        maximize: bool = False,
        mesh: "DeviceMesh | None" = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            LowRank(rank, power_iterations, value_dtype, error_dtype, error_feedback),
            GGT(eps, beta2, refresh_every, relative_eps),
            window=window,
            direction=direction,
            momentum=momentum,
            beta1=beta1,
            weight_decay=weight_decay,
            update_rms=update_rms,
            max_update_norm=max_update_norm,
            momentum_dtype=momentum_dtype,
            maximize=maximize,
            mesh=mesh,
        )


class DenseGGT(EFCP):
    """Full-matrix Adagrad over a window of whole gradients (GGT, arXiv 1806.02958).

    A step, with the gradient g:

        c = g                               keeps the gradient g
        u = [√(GᵀG) + εI]⁻¹ c               preconditions with the last m of these, the rows of G
        θ ← (1 − lr · weight_decay) θ − lr · u

    Updates u are never longer than 1. State: `window` times the memory of the parameters.

    Args:
        params: what to optimise: parameters, named parameters, or param groups. Real floating point, on any devices.
        lr: learning rate, ≥ 0: a float or a tensor of one element. Not on Adam's scale: updates u are never longer than
            1. SparseGGT wanted 0.3 to 1 in our experiments.
        window: m, how many gradients are kept, ≥ 1. Each takes as much memory as the parameters. Fixed from the first
            step on.
        eps: ε > 0, in the units of a gradient; added to the square root of the Gram matrix.
        relative_eps: whether ε is relative to the gradients: times the root mean square of the rows' lengths. Start
            from 0.1.
        beta1: in [0, 1): the average a ← beta1 · a + (1 − beta1) · g is compressed in place of the gradient g. Above 0
            it takes a tensor as large as each parameter.
        beta2: in (0, 1]: a row of the window counts beta2^age. 1 counts all rows alike.
        refresh_every: steps from one eigendecomposition of the Gram matrix to the next, ≥ 1. The weights stay the same
            up to rounding. It saves time for windows of some hundreds of rows. Fixed from the first step on.
        direction: what is preconditioned. "row": the newest row c, as in the papers. "average": the mean of the rows
            held, weighted momentum^age; it takes no memory. "momentum": a dense a ← momentum · a + (1 − momentum) · g,
            which takes a tensor as large as each parameter (`momentum_dtype`). Fixed from the first step on.
        momentum: in [0, 1). With direction "row" it is that of the update: v ← momentum · v + u, and the step goes
            along v; above 0 this takes a tensor as large as each parameter.
        weight_decay: ≥ 0, decoupled from the gradient as in AdamW: parameters shrink by the factor 1 − lr ·
            weight_decay.
        update_rms: > 0: u is scaled so that the root mean square of its entries is this, taken over all parameters that
            have a gradient. With 0.2, the size of Adam's updates, a learning rate that is good for AdamW is a good
            start. None leaves u as it is.
        max_update_norm: > 0: a longer update u is scaled down to this norm, taken over all parameters. None sets no
            limit.
        momentum_dtype: of the momentum: floating point; or torch.int8 with direction "momentum", 1.06 bytes an entry.
            None takes the parameter's. Fixed from the first step on.
        maximize: climb the objective instead of descending it.
        mesh: a DeviceMesh of one dimension whose ranks have the same parameters and gradients, as with
            `DistributedDataParallel`: each keeps its share of the state. DTensors, of `fully_shard`, need none.

    Raises:
        ValueError: for values that are not allowed.
        TypeError: for parameters that are not real floating point.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.3,
        *,
        window: int = 100,
        eps: float = 1e-5,
        relative_eps: bool = False,
        beta1: float = 0.0,
        beta2: float = 1.0,
        refresh_every: int = 1,
        direction: str = "row",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        update_rms: float | None = None,
        max_update_norm: float | None = None,
        momentum_dtype: torch.dtype | None = None,
        maximize: bool = False,
        mesh: "DeviceMesh | None" = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            Identity(),
            GGT(eps, beta2, refresh_every, relative_eps),
            window=window,
            direction=direction,
            momentum=momentum,
            beta1=beta1,
            weight_decay=weight_decay,
            update_rms=update_rms,
            max_update_norm=max_update_norm,
            momentum_dtype=momentum_dtype,
            maximize=maximize,
            mesh=mesh,
        )


class MicroAdam(EFCP):
    """Adam whose moments are sums over a short window of sparse gradients (MicroAdam, arXiv 2405.15593).

    A step, with the gradient g:

        c = Top-k(e + g),  e ← e + g − c    keeps the largest entries in each block of the gradient g
        M = c₁ Σ β₁^age V,  W = c₂ Σ β₂^age V²   over the last m of these, V; the newest has age 0
        u = M / (√W + ε)                    entry by entry; 0 for entries that are in none of them
        θ ← (1 − lr · weight_decay) θ − lr · u

    State, with the default options: 0.40 bytes for the window and 0.53 for the error e, per parameter; AdamW's is 8 in
    float32. `efcp.estimate_memory(model, MicroAdam)` says what it comes to.

    Args:
        params: what to optimise: parameters, named parameters, or param groups. Real floating point, on any devices.
        lr: learning rate, ≥ 0: a float or a tensor of one element. Start from AdamW's.
        window: m, how many gradients are kept, ≥ 1. Memory grows with window · density. Fixed from the first step on.
        density: the share of entries kept of each gradient, in (0, 1]: ceil(density · L) of a block of L entries. Fixed
            from the first step on.
        betas: β₁ and β₂ of the two moments, each in [0, 1).
        eps: ε, added to the root of the second moment; at least 1.2e-38.
        weight_decay: ≥ 0, decoupled from the gradient as in AdamW: parameters shrink by the factor 1 − lr ·
            weight_decay.
        block_size: entries of a block, an integer from 1 to 32768. Positions take one byte up to 256, two above. Fixed
            from the first step on.
        error_dtype: of the error e: torch.int4 or torch.int8, 0.53 or 1.06 bytes an entry; torch.bfloat16,
            torch.float32 or torch.float64. None takes float64 for float64 parameters, and float32 for all others. Fixed
            from the first step on.
        correction: cₖ = (1 − βₖ) / (1 − βₖⁿ). "window": n is the number of rows held, which gives updates Adam's size.
            "step": n is the number of steps, as published; with the default window and betas updates are then up to
            6.5 times as large.
        value_dtype: of the kept entries: torch.bfloat16 or torch.float32. Fixed from the first step on.
        error_feedback: whether what is left out of one gradient is added to the next. Without it there is no error to
            keep. Fixed from the first step on.
        maximize: climb the objective instead of descending it.
        aligned: cut parameters into the blocks that sharded ones have, so that checkpoints of one process and of
            several can be exchanged. None: sharded parameters alone. Fixed from the first step on.
        mesh: a DeviceMesh of one dimension whose ranks have the same parameters and gradients, as with
            `DistributedDataParallel`: each keeps its share of the state. DTensors, of `fully_shard`, need none.

    Raises:
        ValueError: for values that are not allowed.
        TypeError: for parameters that are not real floating point.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        window: int = 10,
        density: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        block_size: int = 4096,
        error_dtype: torch.dtype | None = torch.int4,  # type: ignore[attr-defined]
        correction: str = "window",
        value_dtype: torch.dtype = torch.bfloat16,
        error_feedback: bool = True,
        maximize: bool = False,
        aligned: bool | None = None,
        mesh: "DeviceMesh | None" = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            TopK(density, block_size, value_dtype, error_dtype, error_feedback, aligned),
            AdamStats(betas, eps, correction),
            window=window,
            weight_decay=weight_decay,
            maximize=maximize,
            mesh=mesh,
        )


class MFACW(EFCP):
    """M-FAC's compressed metric for a dense momentum, on AdamW's scale: what to try in AdamW's place.

    A step, with the gradient g and the rows G of the window, rank-r approximations of gradients with error feedback:

        a ← momentum · a + (1 − momentum) · g
        u = (λI + GᵀG/m)⁻¹ a,  scaled to a root mean square of `update_rms` over all parameters
        θ ← (1 − lr · weight_decay) θ − lr · u

    with λ relative to the rows' lengths (arXiv 2107.03356, 2306.06098). Param groups with `adamw=True` are stepped by
    AdamW; `efcp.param_groups(model)` makes the usual split, which language models want:

    >>> optimizer = MFACW(efcp.param_groups(model), lr=1e-3, weight_decay=0.01)

    State, of a matrix of R × C entries with the default options: 2 · window · rank · (R + C) bytes for the window, and
    for each entry 1.06 for the momentum and 0.53 for the error. Vectors take 4 · window bytes an entry.

    Args:
        params: what to optimise: parameters, named parameters, or param groups. Real floating point, on any devices.
        lr: learning rate, ≥ 0: a float or a tensor of one element. Start from AdamW's.
        weight_decay: ≥ 0, decoupled from the gradient as in AdamW: parameters shrink by the factor 1 − lr ·
            weight_decay.
        momentum: in [0, 1), of the dense momentum a.
        rank: r, the rank of what is kept of a gradient matrix, ≥ 1. Fixed from the first step on.
        window: m, how many gradients are kept, ≥ 1. Fixed from the first step on.
        damping: κ > 0: λ · window = κ · (the mean squared length of the rows). The larger, the nearer u is to the
            momentum itself. 0.01 for language models.
        update_rms: > 0, of the update's entries: 0.2 is the size of Adam's.
        momentum_dtype: torch.int8, with a scale for 64 entries, or floating point. Fixed from the first step on.
        error_dtype: of what is left out of the window: torch.int4 or torch.int8, with a scale for 128 or 64 entries, or
            floating point. Fixed from the first step on.
        maximize: climb the objective instead of descending it.
        mesh: a DeviceMesh of one dimension whose ranks have the same parameters and gradients, as with
            `DistributedDataParallel`: each keeps its share of the state. DTensors, of `fully_shard`, need none.

    Raises:
        ValueError: for values that are not allowed.
        TypeError: for parameters that are not real floating point.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        rank: int = 4,
        window: int = 32,
        damping: float = 0.1,
        update_rms: float = 0.2,
        momentum_dtype: torch.dtype | None = torch.int8,
        error_dtype: torch.dtype | None = torch.int4,  # type: ignore[attr-defined]
        maximize: bool = False,
        mesh: "DeviceMesh | None" = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            LowRank(rank, error_dtype=error_dtype),
            MFAC(damping, relative=True),
            window=window,
            direction="momentum",
            momentum=momentum,
            weight_decay=weight_decay,
            update_rms=update_rms,
            momentum_dtype=momentum_dtype,
            maximize=maximize,
            mesh=mesh,
        )


class KroneckerW(EFCP):
    """Shampoo's Kronecker factors of a low-rank window, for a dense momentum, on AdamW's scale: for language models.

    A step of each matrix, with the gradient g and the rows A_i of the window, which keep a rank-r approximation of g
    with error feedback:

        a ← momentum · a + (1 − momentum) · g
        u = (L + δ_L I)^(−1/4) a (R + δ_R I)^(−1/4),  L = Σ A_i A_iᵀ, R = Σ A_iᵀ A_i
        scaled to a root mean square of `update_rms` for each matrix
        θ ← (1 − lr · weight_decay) θ − lr · u

    with δ relative to the mean of the diagonals (arXiv 1802.09568). Param groups with `adamw=True` are stepped by
    AdamW; `efcp.param_groups(model)` makes the usual split:

    >>> optimizer = KroneckerW(efcp.param_groups(model), lr=1e-2, weight_decay=0.01)

    State: as that of `MFACW`; with refresh_every > 1 further 4 · (window · rank)² bytes for each side of a matrix.

    Args:
        params: what to optimise: parameters, named parameters, or param groups. Real floating point, on any devices.
        lr: learning rate, ≥ 0: a float or a tensor of one element. Start from AdamW's; language
            models want three to ten times as much.
        weight_decay: ≥ 0, decoupled from the gradient as in AdamW: parameters shrink by the factor 1 − lr ·
            weight_decay.
        momentum: in [0, 1), of the dense momentum a.
        rank: r, the rank of what is kept of a gradient matrix, ≥ 1. Fixed from the first step on.
        window: m, how many gradients are kept, ≥ 1. Fixed from the first step on.
        damping: κ > 0: δ is κ times the mean of a factor's diagonal. The default is for language models; 1e-3 for
            networks of images.
        sides: 2: both factors. 1: that of the shorter side alone, with the power −1/2. Fixed from the first step on.
        refresh_every: steps from one decomposition of the factors to the next, ≥ 1. More save time and cost quality:
            the rows in between do not count. Fixed from the first step on.
        update_rms: > 0, of the entries of each matrix's update: 0.2 is the size of Adam's.
        momentum_dtype: torch.int8, with a scale for 64 entries, or floating point. Fixed from the first step on.
        error_dtype: of what is left out of the window: torch.int4 or torch.int8, with a scale for 128 or 64 entries, or
            floating point. Fixed from the first step on.
        maximize: climb the objective instead of descending it.
        mesh: a DeviceMesh of one dimension whose ranks have the same parameters and gradients, as with
            `DistributedDataParallel`: each keeps its share of the state. DTensors, of `fully_shard`, need none.

    Raises:
        ValueError: for values that are not allowed.
        TypeError: for parameters that are not real floating point.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        rank: int = 4,
        window: int = 32,
        damping: float = 1e-4,
        sides: int = 2,
        refresh_every: int = 1,
        update_rms: float = 0.2,
        momentum_dtype: torch.dtype | None = torch.int8,
        error_dtype: torch.dtype | None = torch.int8,
        maximize: bool = False,
        mesh: "DeviceMesh | None" = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            LowRank(rank, error_dtype=error_dtype),
            Kronecker(damping, sides, refresh_every),
            window=window,
            direction="momentum",
            momentum=momentum,
            weight_decay=weight_decay,
            update_rms=update_rms,
            momentum_dtype=momentum_dtype,
            maximize=maximize,
            mesh=mesh,
        )
