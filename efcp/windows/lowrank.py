"""The low-rank window: of each gradient matrix a rank-r approximation is kept, and error feedback hands on the rest.

A parameter of two or more dimensions is taken as a matrix, the first dimension × all others. Row i of its window is
Pᵢ Qᵢᵀ, of which the factors are kept. State of a parameter of R × C elements:

    left   (m, r, R)  Pᵢᵀ: r orthonormal rows, up to rounding
    right  (m, r, C)  Qᵢᵀ
    basis  (C, r)     where the next power iteration starts
    error  (n,)       what has been left out of the window so far; absent without error feedback

With few bits (`efcp.kernels.lowbit`) the error is kept as error_codes and error_scales, and in 4 bits there is a
counter error_draws, (1,) int64: the key of the random numbers of the next step.

Vectors and scalars, and matrices so small that their factors would be no smaller, are kept whole: rows (m, n).
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor

from efcp.checks import require, require_integer
from efcp.gram import is_on_cpu
from efcp.kernels import LowBit, accumulation_dtype, add_lowbit_, lowbit, store_lowbit_
from efcp.shards import Layout
from efcp.windows.base import BITS, Compressor, Window, allocate_error, choose_dtypes, error_of
from efcp.windows.batched import (
    ALIGNED,
    BatchableWindow,
    Batched,
    add_numbers_,
    part_numel,
    replace_rows,
    view,
)
from efcp.windows.dense import DenseWindow, Identity, check_rows


@dataclass(frozen=True)
class LowRank(Compressor):
    """Keeps a rank-r approximation of each gradient matrix, found by power iteration (PowerSGD, arXiv 1905.13727).

    Iterations start where those of the last step ended; the very first starts from random numbers that depend on the
    shape alone, hence are the same in every process. Products with parameters that are not float64 are in float32, and
    in TF32 where `torch.set_float32_matmul_precision` asks for it; inner products of rows always in float64.

    Args:
        rank: r ≥ 1. A matrix of R × C elements with r · (R + C) ≥ R · C is kept whole.
        power_iterations: iterations in each step, ≥ 1. More bring the approximation closer to the best of that rank.
        value_dtype: dtype of the factors: torch.bfloat16 or torch.float32; float16 could overflow.
        error_dtype: dtype of the error: torch.bfloat16, torch.float32 or torch.float64; torch.int8 or torch.int4, with
            a scale for 64 or 128 elements. None takes float64 for float64 parameters and float32 for all others.
        error_feedback: add what was not kept of a gradient to the next one.

    Raises:
        ValueError: for values that are not allowed.
    """

    rank: int = 4
    power_iterations: int = 1
    value_dtype: torch.dtype = torch.bfloat16
    error_dtype: torch.dtype | None = None
    error_feedback: bool = True

    def __post_init__(self) -> None:
        require_integer("rank", self.rank, 1)
        require_integer("power_iterations", self.power_iterations, 1)
        choose_dtypes(self)
        require(isinstance(self.error_feedback, bool), "error_feedback", "be True or False", self.error_feedback)

    def of_parts(self, layout: Layout) -> Compressor:
        own = {field.name: getattr(self, field.name) for field in fields(LowRank)}
        return LowRankOfParts(**own, largest=layout.largest)

    def unit(self, name: str) -> int | None:
        if name not in ("error_codes", "error_scales"):
            return None
        return lowbit.BLOCK[torch.uint8 if BITS[self.error_dtype] == 4 else torch.int8]

    def row_names(self, param: Tensor) -> tuple[str, ...]:
        return ("left", "right") if self._factors(param) else Identity().row_names(param)

    def allocate(self, param: Tensor, window_size: int) -> dict[str, Tensor]:
        if not self._factors(param):
            return Identity().allocate(param, window_size)
        (rows, columns), r, device = _matrix_shape(param), self.rank, param.device
        dtype = accumulation_dtype(param.dtype)
        generator = torch.Generator().manual_seed(0)
        state = {
            "left": torch.zeros(window_size, r, rows, dtype=self.value_dtype, device=device),
            "right": torch.zeros(window_size, r, columns, dtype=self.value_dtype, device=device),
            "basis": torch.randn(columns, r, generator=generator, dtype=dtype, device="cpu").to(device),
        }
        if self.error_feedback:
            state |= allocate_error(param.numel(), self.error_dtype or dtype, device)
        return state

    def check_shape(self, name: Callable[[], str], state: dict[str, Any], param: Tensor) -> None:
        whole = param.numel(), 1
        own = _matrix_shape(param) if param.dim() >= 2 else whole
        kept = (state["left"].shape[2], state["right"].shape[2]) if "left" in state else whole
        if "left" in state and kept == own:
            require(self._factors(param), "rank", "stay what it was", self.rank)
        elif "left" in state or self._factors(param):
            raise ValueError(
                f"the state of a parameter must be for its shape: {name()} is taken as {own[0]} × {own[1]}, its state "
                f"is for {kept[0]} × {kept[1]}; delete optimizer.state[p] where a parameter is replaced by one of "
                "another shape"
            )

    def bind(self, states: Sequence[dict[str, Tensor]], params: Sequence[Tensor]) -> Window:
        return Batched([self._bind(state, param) for state, param in zip(states, params, strict=True)])

    def _bind(self, state: dict[str, Tensor], param: Tensor) -> BatchableWindow:
        if not self._factors(param):
            require("left" not in state, "rank", "stay what it was", self.rank)
            return DenseWindow(check_rows(state["rows"], param))
        left, error = state["left"], error_of(state)
        require(left.shape[1] == self.rank and "rows" not in state, "rank", "stay what it was", self.rank)
        sizes, own = (left.shape[2], state["right"].shape[2]), _matrix_shape(param)
        require(sizes == own, f"the shape of a parameter taken as {own[0]} × {own[1]}", f"stay that of {sizes}", own)
        require(left.dtype == self.value_dtype, "value_dtype", f"stay {left.dtype}", self.value_dtype)
        require((error is not None) == self.error_feedback, "error_feedback", "stay what it was", self.error_feedback)
        return LowRankWindow(
            left, state["right"], state["basis"], error, state.get("error_draws"), self.power_iterations
        )

    def _factors(self, param: Tensor) -> bool:
        """Whether factors are kept of a parameter, not whole rows."""
        return _are_fewer(self.rank, param.shape)


@dataclass(frozen=True)
class LowRankOfParts(LowRank):
    """Low rank of each part of a matrix that is divided over processes, taken as a matrix of its own.

    Args:
        largest: the shape of the largest part, which decides for all whether factors are kept.
    """

    largest: tuple[int, ...] = ()

    def _factors(self, param: Tensor) -> bool:
        return _are_fewer(self.rank, torch.Size(self.largest))


@lru_cache(maxsize=4096)  # most parameters have the same shape in every step
def _are_fewer(rank: int, shape: torch.Size) -> bool:
    return len(shape) >= 2 and rank * (shape[0] + math.prod(shape[1:])) < shape.numel()


def _orthonormal(matrices: Tensor) -> Tensor:
    """Orthonormal columns that span those of matrices (…, R, r), whatever their rank: Householder's. Zeros beyond R."""
    columns = torch.linalg.qr(matrices).Q
    lacking = matrices.shape[-1] - columns.shape[-1]  # only of parts of a matrix that have fewer than r rows
    return torch.nn.functional.pad(columns, (0, lacking)) if lacking else columns


def _matrix_shape(param: Tensor) -> tuple[int, int]:
    return param.shape[0], math.prod(param.shape[1:])


@dataclass(frozen=True)
class LowRankWindow(BatchableWindow):
    left: Tensor
    right: Tensor
    basis: Tensor
    error: Tensor | LowBit | None
    draws: Tensor | None
    power_iterations: int

    def __len__(self) -> int:
        return len(self.left)

    def push(self, grad: Tensor, slot: Tensor, finite: Tensor) -> None:
        parts = list(self.parts())
        whole = self._wanted(grad, finite) if len(parts) == 1 else None

        def matrices() -> Iterator[tuple["LowRankWindow", Tensor]]:
            """A by its rows, which takes less memory than to keep it."""
            for some, part in parts:
                yield part, part._wanted(grad[some], finite) if whole is None else whole

        heights, Q = [part.left.shape[2] for _, part in parts], self.basis
        for _ in range(self.power_iterations):
            # Products of few rows are several times as fast as those of few columns.
            P = torch.cat([Q.t() @ A.t() for _, A in matrices()], 1).t()
            P = _orthonormal(P)  # (R, r)
            Q = reduce(torch.add, (p.t() @ A for p, (_, A) in zip(P.split(heights), matrices(), strict=True))).t()
        longest = Q.abs().amax(0)  # a column of zeros, or of a size that overflows when squared, would be a bad start
        self.basis.copy_(torch.where(finite & (longest > 0), Q / longest, self.basis))

        left, right = P.to(self.left.dtype), torch.where(finite, Q, 0.0).to(self.right.dtype)
        self.left.index_copy_(0, slot, left.t().unsqueeze(0))
        self.right.index_copy_(0, slot, right.t().unsqueeze(0))
        if self.error is None:
            return
        kept = right.to(Q.dtype).t()
        for number, (own, (part, A)) in enumerate(zip(left.split(heights), matrices(), strict=True)):
            rest = A.addmm_(own.to(A.dtype), kept, alpha=-1).view(-1)  # the error where not finite
            if isinstance(part.error, Tensor):
                part.error.copy_(rest)
            elif part.error is not None:
                keys = [] if self.draws is None else [self.draws + (number << 48)]  # no two parts draw the same
                store_lowbit_([part.error], [rest], finite, keys)
        if self.draws is not None:
            self.draws.add_(1)

    def _wanted(self, grad: Tensor, finite: Tensor) -> Tensor:
        """A, the gradient and the error as a matrix (R, C); zero and the error where not finite."""
        if not (is_on_cpu(finite) and finite):  # else a pass fewer
            grad = torch.where(finite, grad, 0.0)
        grad, shape = grad.to(self.basis.dtype), (self.left.shape[2], self.right.shape[2])
        if not isinstance(self.error, LowBit):
            return (grad.clone() if self.error is None else grad + self.error).view(shape)
        A = grad.clone()
        add_lowbit_([A], [self.error])
        return A.view(shape)

    def parts(self) -> Iterator[tuple[slice, "LowRankWindow"]]:
        """Yields the window in parts, by rows of the matrix, with the elements that each is of."""
        (_, _, rows), columns = self.left.shape, self.right.shape[2]
        unit = ALIGNED // math.gcd(columns, ALIGNED)
        step = max(1, part_numel(self.left.device) // (columns * unit)) * unit
        if step >= rows:
            yield slice(0, self.numel), self
            return
        right = self.right.to(self.basis.dtype)  # once for all parts
        for first in range(0, rows, step):
            some = slice(first * columns, min(first + step, rows) * columns)
            error = None if self.error is None else view(self.error, some)
            yield some, replace(self, left=self.left[..., first : first + step], right=right, error=error)

    def clear(self, slot: Tensor) -> None:
        self.right.index_fill_(0, slot, 0.0)

    def apply_(self, target: Tensor, weights: Tensor, factor: Tensor) -> None:
        dtype = accumulation_dtype(target.dtype)
        total = target.view(self.left.shape[2], self.right.shape[2]).to(dtype)  # itself where it has this dtype
        total.mul_(factor)
        for rows in self._parts():
            P = self.left[rows].to(dtype) * weights[rows, None, None].to(dtype)  # (rows, r, R)
            total.addmm_(P.flatten(0, 1).t(), self.right[rows].to(dtype).flatten(0, 1))
        if total.dtype != target.dtype:
            target.copy_(total.view(-1))

    def dots(self, slot: Tensor) -> Tensor:
        """⟨Pᵢ Qᵢᵀ, P Qᵀ⟩ = Σ (PᵢᵀP) ∘ (QᵢᵀQ) for all rows i, with the factors P (R, r) and Q (C, r) of row `slot`."""
        left, right = (factors.index_select(0, slot)[0].double() for factors in (self.left, self.right))
        dots = []
        for rows in self._parts():
            own = self.left[rows].double().flatten(0, 1), self.right[rows].double().flatten(0, 1)  # (rows r, ·)
            both = (left @ own[0].t()) * (right @ own[1].t())  # (r, rows r)
            dots.append(both.sum(0).view(-1, len(left)).sum(1))
        return torch.cat(dots)

    def products(self, vector: Tensor) -> Tensor:
        """⟨Pᵢ Qᵢᵀ, A⟩ = Σ (PᵢᵀA) ∘ Qᵢᵀ for all rows i, of a matrix A."""
        (window_size, rank, rows), columns = self.left.shape, self.right.shape[2]
        A, left = vector.view(rows, columns), self.left.double().flatten(0, 1)  # (m r, R)
        dots = torch.zeros(window_size * rank, dtype=torch.float64, device=vector.device)
        step = max(256, 2 * part_numel(vector.device) // (rows + 2 * len(left)))
        for first in range(0, columns, step):
            some = slice(first, first + step)
            dots += (left @ A[:, some].double()).mul_(self.right[..., some].flatten(0, 1)).sum(1)
        return dots.view(window_size, rank).sum(1)

    def _parts(self) -> Iterator[slice]:
        """Rows in parts, so that no temporary grows with the window."""
        window_size, rank, rows = self.left.shape
        step = max(1, 2 * part_numel(self.left.device) // (rank * (rows + self.right.shape[2])))
        return (slice(first, first + step) for first in range(0, window_size, step))

    # ---- several of the same shape, stacked: p matrices A are (p, R, C)

    @property
    def kind(self) -> Hashable:
        """Other options are the same for all parameters of a set."""
        shapes = self.left.shape, self.right.shape[2], self.left.dtype, self.basis.dtype
        return LowRankWindow, *shapes, type(self.error), self.power_iterations

    @property
    def numel(self) -> int:
        return self.left.shape[2] * self.right.shape[2]

    @property
    def row_numel(self) -> int:
        return self.left.shape[1] * (self.left.shape[2] + self.right.shape[2])

    @classmethod
    def push_all(
        cls, windows: Sequence["LowRankWindow"], grads: Sequence[Tensor], slot: Tensor, finite: Tensor
    ) -> None:
        first = windows[0]
        buffer = torch.cat(list(grads)).to(first.basis.dtype).masked_fill_(~finite, 0.0)
        parts = buffer.split(first.numel)
        lowbit = [w.error for w in windows if isinstance(w.error, LowBit)]
        errors = [w.error for w in windows if isinstance(w.error, Tensor)]
        if lowbit:
            add_numbers_(buffer, lowbit, [first.numel] * len(windows))
        elif errors:
            torch._foreach_add_(list(parts), errors)
        A, bases = buffer.view(len(windows), first.left.shape[2], -1), [w.basis for w in windows]
        old = Q = torch.stack(bases)  # (p, C, r)
        for _ in range(first.power_iterations):
            P = _orthonormal((Q.mT @ A.mT).mT)  # (p, R, r)
            Q = (P.mT @ A).mT  # (p, C, r)
        longest = Q.abs().amax(1, keepdim=True)
        torch._foreach_copy_(bases, torch.where(finite & (longest > 0), Q / longest, old).unbind())

        left, right = P.to(first.left.dtype), torch.where(finite, Q, 0.0).to(first.right.dtype)
        replace_rows([w.left for w in windows], slot, left.mT.unbind())
        replace_rows([w.right for w in windows], slot, right.mT.unbind())
        if lowbit or errors:
            A.baddbmm_(left.to(A.dtype), right.to(A.dtype).mT, alpha=-1)
        if errors:
            torch._foreach_copy_(errors, parts)
        if lowbit:
            draws = [w.draws for w in windows if w.draws is not None]
            store_lowbit_(lowbit, parts, finite, draws)
            if draws:
                torch._foreach_add_(draws, 1)

    @classmethod
    def dots_all(cls, windows: Sequence["LowRankWindow"], slot: Tensor, vectors: Tensor | None) -> Tensor:
        window_size, rank, rows = windows[0].left.shape
        left, right = cls.stacked(windows, torch.float64)
        both = []
        for factors in (left, right):
            newest = factors.unflatten(1, (window_size, rank)).index_select(1, slot).squeeze(1)  # (p, r, ·)
            both.append(newest @ factors.mT)  # (p, r, m r)
        dots = [both[0].mul_(both[1]).sum((0, 1))]
        if vectors is not None:
            dots.append((left @ vectors.view(len(windows), rows, -1)).mul_(right).sum((0, 2)))
        return torch.stack([x.view(window_size, rank).sum(1) for x in dots])

    @classmethod
    def add_rows_(cls, windows: Sequence["LowRankWindow"], total: Tensor, weights: Tensor) -> None:
        left, right = cls.stacked(windows, weights.dtype)
        weighted = left.mul_(weights.repeat_interleave(windows[0].left.shape[1])[:, None])
        total.view(len(windows), left.shape[2], -1).baddbmm_(weighted.mT, right)

    @staticmethod
    def stacked(windows: Sequence["LowRankWindow"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All rows' factors: (p, m r, R) and (p, m r, C)."""
        left, right = torch.stack([w.left for w in windows]), torch.stack([w.right for w in windows])
        return left.flatten(1, 2).to(dtype), right.flatten(1, 2).to(dtype)
