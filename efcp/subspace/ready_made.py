"""The named optimizers in subspaces: `SubspaceAdam` with its parts chosen, and their options as arguments."""

from torch import Tensor
from torch.optim.optimizer import ParamsT

from efcp.subspace.errors import LDAdamError, NoError
from efcp.subspace.optimizer import SubspaceAdam
from efcp.subspace.projectors import SVD, PowerIteration, RandomizedSVD
from efcp.subspace.transports import LDAdamTransport, NoTransport


class GaLoreAdamW(SubspaceAdam):
    """AdamW in the leading singular directions of each gradient matrix (GaLore, arXiv 2403.03507).

    A step of a matrix, turned so that its shorter side comes first, with the gradient g:

        P = the `rank` leading left singular vectors of g, every `every` steps
        x = Pᵀg,  m ← β₁ m + (1 − β₁) x,  v ← β₂ v + (1 − β₂) x²
        θ ← (1 − lr · weight_decay) θ − lr · scale · P m̂ / (√v̂ + ε)

    The moments stay as they are when P changes. Vectors, and matrices whose shorter side is no longer than `rank`, are
    stepped by AdamW. State, of a matrix of n × k entries with n ≤ k: 4 · rank · (n + 2k) bytes; AdamW's is 8 · n · k.
    `efcp.estimate_memory(model, GaLoreAdamW)` says what it comes to.

    Args:
        params: what to optimise: parameters, named parameters, or param groups. Real floating point, on any devices,
            not divided over processes.
        lr: learning rate, ≥ 0: a float or a tensor of one element. The default is the paper's for pretraining; for
            fine-tuning it takes 1e-5 to 3e-5. Of parameters that AdamW steps it is AdamW's, for which it may be too
            large: give them a param group of their own.
        rank: r, the dimension of the subspaces, ≥ 1. The paper takes a quarter of the shorter side for pretraining,
            4 or 8 for fine-tuning. Fixed from the first step on.
        every: T, steps from one decomposition to the next, ≥ 1. The paper's is 200.
        scale: α ≥ 0: a factor of the updates in subspaces. The paper's is 0.25, for fine-tuning 2 to 4.
        betas: β₁ and β₂ of the two moments, each in [0, 1).
        eps: ε, added to the root of the second moment; at least 1.2e-38.
        weight_decay: ≥ 0, decoupled from the gradient as in AdamW: parameters shrink by the factor 1 − lr ·
            weight_decay, before the update.
        maximize: climb the objective instead of descending it.

    Raises:
        ValueError: for values that are not allowed.
        TypeError: for parameters that are not real floating point, or are DTensors.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        *,
        rank: int = 128,
        every: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            projector=SVD(rank, every),
            transport=NoTransport(),
            error=NoError(),
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            scale=scale,
            maximize=maximize,
        )


class LDAdamW(SubspaceAdam):
    """AdamW in a subspace that moves in every step, with error feedback (LDAdam, arXiv 2410.16103).

    A step of a matrix, turned so that its shorter side comes first, with the gradient g and c completed steps:

        a = g + e
        b = ρ P₋m̂ + (1 − ρ) a,  P = QR(b (bᵀP₋))    the first P: the leading singular vectors of a
        m̃ = Q m,  ṽ = (1 − β₂ᶜ) |(Q∘Q)(v̂ − m̂²) + (Q m̂)²|,  Q = PᵀP₋
        e ← (a − PPᵀa) + β₁/(1 − β₁) · (P₋m − Pm̃)
        m ← β₁ m̃ + (1 − β₁) Pᵀa,  v ← β₂ ṽ + (1 − β₂) (Pᵀa)²
        θ ← (1 − lr · weight_decay) θ − lr · P m̂ / (√v̂ + ε)

    Vectors, and matrices whose shorter side is no longer than `rank`, are stepped by AdamW. State, of a matrix of n × k
    entries with n ≤ k: 4 · rank · (n + 2k) bytes, and 4 · n · k for the error e; AdamW's is 8 · n · k.
    `efcp.estimate_memory(model, LDAdamW)` says what it comes to.

    Args:
        params: what to optimise: parameters, named parameters, or param groups. Real floating point, on any devices,
            not divided over processes.
        lr: learning rate, ≥ 0: a float or a tensor of one element. The default is the paper's.
        rank: r, the dimension of the subspaces, ≥ 1. The paper's is 16. Fixed from the first step on.
        rho: ρ in [0, 1): the share of the mean in what is decomposed. The paper's is β₁.
        betas: β₁ and β₂ of the two moments, each in [0, 1). The defaults are the paper's.
        eps: ε, added to the root of the second moment; at least 1.2e-38.
        weight_decay: ≥ 0, decoupled from the gradient as in AdamW: parameters shrink by the factor 1 − lr ·
            weight_decay, before the update.
        maximize: climb the objective instead of descending it.

    Raises:
        ValueError: for values that are not allowed.
        TypeError: for parameters that are not real floating point, or are DTensors.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        rank: int = 16,
        rho: float = 0.908,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            projector=PowerIteration(rank, rho),
            transport=LDAdamTransport(),
            error=LDAdamError(),
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
        )


class AdaRankGrad(SubspaceAdam):
    """AdamW in as few singular directions as hold a share of each gradient matrix (AdaRankGrad, arXiv 2410.17881).

    A step of a matrix, turned so that its shorter side comes first, with the gradient g:

        every `every` steps: P = the leading left singular vectors of g, as few as ‖g − PPᵀg‖² ≤ (1 − energy) ‖g‖²
            takes, at most `rank`, from a random sketch; m and v move from the basis so far to P
        x = Pᵀg,  m ← β₁ m + (1 − β₁) x,  v ← β₂ v + (1 − β₂) x²
        θ ← (1 − lr · weight_decay) θ − lr · scale · P m̂ / (√v̂ + ε)

    Moments move as those of `LDAdamW`, which keeps the second from turning negative. The paper lets a subspace go once
    the gradient in it is small; here it stays for a number of steps. Vectors, and matrices whose shorter side is no
    longer than `rank`, are stepped by AdamW. State: as that of `GaLoreAdamW`, for the largest rank.

    Args:
        params: what to optimise: parameters, named parameters, or param groups. Real floating point, on any devices,
            not divided over processes.
        lr: learning rate, ≥ 0: a float or a tensor of one element. The default is GaLore's.
        rank: the largest dimension of the subspaces, ≥ 1. Fixed from the first step on.
        energy: the share of the squared gradient norm that a subspace holds, in (0, 1]. The default is ours, not the
            paper's.
        every: steps from one decomposition to the next, ≥ 1. The default is GaLore's.
        scale: ≥ 0: a factor of the updates in subspaces. The default is GaLore's.
        betas: β₁ and β₂ of the two moments, each in [0, 1).
        eps: ε, added to the root of the second moment; at least 1.2e-38.
        weight_decay: ≥ 0, decoupled from the gradient as in AdamW: parameters shrink by the factor 1 − lr ·
            weight_decay, before the update.
        maximize: climb the objective instead of descending it.

    Raises:
        ValueError: for values that are not allowed.
        TypeError: for parameters that are not real floating point, or are DTensors.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        *,
        rank: int = 128,
        energy: float = 0.99,
        every: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            projector=RandomizedSVD(rank, energy, every),
            transport=LDAdamTransport(),
            error=NoError(),
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            scale=scale,
            maximize=maximize,
        )
