"""Projectors: which r orthonormal columns P span the subspace in which a gradient matrix is seen.

A matrix is turned so that its shorter side comes first: a is (n, k) with n ≤ k, P is (n, r), and x = Pᵀa is (r, k).

    SVD              P = the r leading left singular vectors of a
    RandomizedSVD    the same up to a random sketch; of these the first that hold a share of ‖a‖², the rest zero columns
    PowerIteration   P = QR(b (bᵀP₋)),  b = ρ P₋m̂ + (1 − ρ) a,  P₋ the basis so far and m̂ the mean of x in it
    DCT              P = the columns dⱼ of the cosine transform with the largest ‖dⱼᵀa‖₁

State of a matrix:

    basis    (n, r)  float32, or float64 for float64 parameters   of SVD, RandomizedSVD and PowerIteration
    indices  (r,)    int64, ascending                             of DCT

All is zero until the first step. What chooses a basis is a function of its arguments alone, so runs can be resumed bit
for bit. A projector knows neither transports nor errors.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from efcp.checks import check_content, is_number, plain, require, require_integer, require_number

OVERSAMPLING = 8  # further columns of a sketch
TOLERANCE = 1e-3  # of a loaded basis' inner products; float32 bases of any size are far nearer to orthonormal


class Projector(ABC):
    """Chooses the subspace of a gradient matrix. A subclass is a frozen dataclass whose fields are plain values.

    Attributes:
        rank: r ≥ 1, the columns of a basis.
        every: steps from one choice of a basis to the next, ≥ 1.
        needs_transport: whether the method has no meaning with moments that stay behind when the basis moves.
    """

    needs_transport: ClassVar[bool] = False
    rank: int  # not fields: a subclass declares those of these two that are options
    every: int

    def __post_init__(self) -> None:
        require_integer("rank", self.rank, 1)
        require_integer("every", self.every, 1)

    @property
    def options(self) -> dict[str, Any]:
        """The options as plain values, so that param groups can be saved anywhere."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]

    def forms(self, n: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shapes and dtypes of what is kept for a matrix whose shorter side has n entries.

        Args:
            dtype: of the arithmetic.
        """
        return {"basis": ((n, self.rank), dtype)}

    def basis(self, state: dict[str, Tensor], n: int, dtype: torch.dtype) -> Tensor:
        """P, (n, r): its columns are orthonormal, or zero."""
        return state["basis"]

    def rotation(self, new: dict[str, Tensor], old: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Q = PᵀP₋, (r, r): what a basis says of the one before it."""
        return new["basis"].T @ old["basis"]

    @abstractmethod
    def choose(self, state: dict[str, Tensor], a: Tensor, mean: Tensor, first: bool) -> dict[str, Tensor]:
        """New values of all that `forms` names.

        Args:
            state: what is kept so far, which stays as it is.
            a: (n, k), the gradient and what was left of earlier ones.
            mean: m̂, (r, k), the mean of x in the basis so far, corrected for its start at zero.
            first: whether there is no basis yet.
        """

    def check(self, where: str, state: dict[str, Tensor], n: int) -> None:
        """Raises ValueError where what is kept, of the right shapes and finite, is no basis."""
        basis = state["basis"].double()
        expected = torch.diag((basis != 0).any(0).double())
        holds = (basis.T @ basis - expected).abs().max() <= TOLERANCE
        check_content(where, "basis", holds, "have columns that are orthonormal or zero")


@dataclass(frozen=True)
class SVD(Projector):
    """The leading singular vectors of the gradient matrix, anew every T steps (GaLore, arXiv 2403.03507).

    Each vector has the sign that makes its largest entry positive, which matters where moments are not transported.

    Args:
        rank: r ≥ 1. Matrices whose shorter side is no longer than this are stepped whole.
        every: T ≥ 1.

    Raises:
        ValueError: for other values.
    """

    rank: int = 128
    every: int = 200

    def choose(self, state: dict[str, Tensor], a: Tensor, mean: Tensor, first: bool) -> dict[str, Tensor]:
        return {"basis": signed(left_vectors(a)[0][:, : self.rank])}


@dataclass(frozen=True)
class RandomizedSVD(Projector):
    """The fewest leading singular vectors that hold a share of ‖a‖², from a sketch (AdaRankGrad, arXiv 2410.17881).

    The basis has the smallest number r of columns in [1, rank] with ‖a − PPᵀa‖² ≤ (1 − energy) ‖a‖², or `rank` where
    no number satisfies this; shapes stay those of `rank`, and columns from r on are zero. The range of a is found from
    a (aᵀ(aΩ)), Ω with rank + 8 Gaussian columns. Ω depends on its shape alone: it is independent of every gradient, and
    a resumed run finds the same.

    Args:
        rank: the largest r, ≥ 1. Matrices whose shorter side is no longer than this are stepped whole.
        energy: the share in (0, 1]; 1 keeps all columns.
        every: steps from one choice to the next, ≥ 1.

    Raises:
        ValueError: for other values.
    """

    rank: int = 128
    energy: float = 0.99
    every: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_number(self.energy) and 0 < self.energy <= 1, "energy", "lie in (0, 1]", self.energy)

    def choose(self, state: dict[str, Tensor], a: Tensor, mean: Tensor, first: bool) -> dict[str, Tensor]:
        a = a / scale_of(a)
        n, k = a.shape
        generator = torch.Generator().manual_seed(0)
        sketch = torch.randn(k, min(self.rank + OVERSAMPLING, n), generator=generator, dtype=torch.float32)
        span = orthonormal(a @ sketch.to(a))
        span = orthonormal(a @ orthonormal(a.T @ span))  # (n, s)
        vectors, values = left_vectors(span.T @ a)
        held = values.square()[: self.rank]
        before = held.cumsum(0) - held  # of the columns further left
        wanted = before < self.energy * a.square().sum() if self.energy < 1 else torch.ones_like(before).bool()
        wanted[0] = True
        return {"basis": signed(span @ vectors[:, : self.rank]) * wanted}


@dataclass(frozen=True)
class PowerIteration(Projector):
    """One block power iteration a step, from the basis so far (LDAdam, arXiv 2410.16103).

    The first basis is that of `SVD`.

    Args:
        rank: r ≥ 1. Matrices whose shorter side is no longer than this are stepped whole.
        rho: ρ in [0, 1): the share of the mean P₋m̂ in what is decomposed; the rest is the gradient's.

    Raises:
        ValueError: for other values.
    """

    needs_transport: ClassVar[bool] = True
    every: ClassVar[int] = 1  # type: ignore[misc]  # not an option
    rank: int = 16
    rho: float = 0.908

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("rho", self.rho, 0, 1)

    def choose(self, state: dict[str, Tensor], a: Tensor, mean: Tensor, first: bool) -> dict[str, Tensor]:
        if first:
            return {"basis": left_vectors(a)[0][:, : self.rank]}
        old = state["basis"]
        b = self.rho * (old @ mean) + (1 - self.rho) * a
        b = b / scale_of(b)  # of which the squares neither overflow nor vanish
        return {"basis": orthonormal(b @ (b.T @ old))}


@dataclass(frozen=True)
class DCT(Projector):
    """Columns of the orthonormal cosine transform (DCT-II), those along which the gradient is largest in the ℓ1 norm.

    Of a basis only the indices of its columns are kept (DCT-AdamW, arXiv 2505.17967). A column that stays from one
    choice to the next keeps its moments exactly under `LDAdamTransport`.

    Args:
        rank: r ≥ 1. Matrices whose shorter side is no longer than this are stepped whole.
        every: steps from one choice to the next, ≥ 1.

    Raises:
        ValueError: for other values.
    """

    rank: int = 128
    every: int = 1

    def forms(self, n: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"indices": ((self.rank,), torch.int64)}

    def basis(self, state: dict[str, Tensor], n: int, dtype: torch.dtype) -> Tensor:
        return cosines(n, state["indices"], dtype)

    def rotation(self, new: dict[str, Tensor], old: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        return (new["indices"][:, None] == old["indices"]).to(dtype)

    def choose(self, state: dict[str, Tensor], a: Tensor, mean: Tensor, first: bool) -> dict[str, Tensor]:
        n = a.shape[0]
        columns = cosines(n, torch.arange(n, device=a.device), a.dtype)  # (n, n)
        norms = (columns.T @ a).abs().sum(1)
        return {"indices": norms.topk(self.rank).indices.sort().values}

    def check(self, where: str, state: dict[str, Tensor], n: int) -> None:
        indices = state["indices"]
        holds = (indices >= 0).all() & (indices < n).all()
        check_content(where, "indices", holds, f"lie in [0, {n})")
        ascending = (indices.diff() > 0).all() | (indices == 0).all()
        check_content(where, "indices", ascending, "be ascending")


def cosines(n: int, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns of the orthonormal DCT-II, (n, len(indices)): entry i of column j is √(2/n) cos(π (2i + 1) j / 2n).

    Column 0 is divided by √2. Angles are reduced in integers, so they are exact for every n.
    """
    odd = 2 * torch.arange(n, device=indices.device) + 1
    angles = (odd[:, None] * indices % (4 * n)).to(dtype) * (math.pi / (2 * n))
    return angles.cos() * ((2 - (indices == 0).to(dtype)) / n).sqrt()


def left_vectors(a: Tensor) -> tuple[Tensor, Tensor]:
    """The left singular vectors of a, (n, min(n, k)), and the singular values, descending."""
    try:
        vectors, values, _ = torch.linalg.svd(a, full_matrices=False)
    except torch.linalg.LinAlgError:  # it need not converge; the eigenvectors of aaᵀ are the same
        double = a.double()
        squares, vectors = torch.linalg.eigh(double @ double.T)
        size = min(a.shape)
        vectors = vectors.flip(1)[:, :size].to(a.dtype)
        values = squares.flip(0)[:size].clamp(min=0).sqrt().to(a.dtype)
    return vectors, values


def orthonormal(a: Tensor) -> Tensor:
    """An orthonormal basis of the columns of a, of the same shape; also where these are dependent."""
    return torch.linalg.qr(a)[0]


def scale_of(a: Tensor) -> Tensor:
    """The largest magnitude in a, 1 where that is 0: ()."""
    largest = a.abs().max()
    return torch.where(largest > 0, largest, 1.0)


def signed(vectors: Tensor) -> Tensor:
    """The columns with signs that make the largest entry of each positive."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))  # (1, r)
    return torch.where(largest < 0, -vectors, vectors)


def require_projector(value: Any) -> None:
    """Raises TypeError unless value is a projector."""
    if not isinstance(value, Projector):
        raise TypeError(f"projector must be an instance of a subclass of efcp.subspace.Projector, got {value!r}")
