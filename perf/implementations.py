"""The implementations of each operation, and of a whole step, that are compared on one problem.

| implementation | what |
|---|---|
| `efcp` | ours for the device: Numba on a CPU, Triton on a GPU |
| `definition` | plain PyTorch, `efcp.kernels.reference`; all others are checked against it |
| `published` | the published algorithm, `published.py`; left out for windows that take it half a minute |
| `torch.topk` | `compress_` by add, abs, topk, gather and scatter; rounding is not fed back |
| `torch.sparse` | products with the window in CSR format; the newest row and the transpose are made beforehand |
| `Adam`, `SGD` | foreach (up to 16.8M elements) and fused, SGD with momentum; checked against their plain loops |

Those of others can be left out. Each works on tensors of its own, except in `compress_`: there all but `published`
write the same row of the window.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam

from efcp import SparseMFAC
from efcp import kernels as dispatched
from efcp.kernels import Update, reference, use_backend
from efcp.perf.problems import DEFAULT_DTYPE, DTYPES, Problem
from efcp.perf.published import PublishedMFAC, RowMajorWindow
from efcp.windows.base import error_of

__all__ = ["DEFINITION", "OPERATIONS", "OURS", "PUBLISHED", "Implementation", "agree"]

OURS, DEFINITION, PUBLISHED = "efcp", "definition", "published"
PUBLISHED_ENTRIES = 220_000_000
FOREACH_ELEMENTS = 1 << 24  # in a parameter; with more, memory is short
LR = 1e-3
MOMENTUM = 0.9
COMPARED = 1 << 22  # elements compared at once, so that no temporary is large
FLOAT32_SUMS = 1e-3  # tolerance for sums of millions of terms in float32


@dataclass(frozen=True)
class Implementation:
    """One way to do an operation.

    Args:
        run: does the operation once.
        results: returns, after the first run, the tensors to compare with the expected ones.
        tolerance: how far results may be off, relative to the largest expected magnitude.
        expected: returns the right results; None for those of the definition.
        bytes: bytes that have to be moved; None for the floor of the operation.
        capturable: whether a CUDA graph can be made of a run.
    """

    run: Callable[[], object]
    results: Callable[[], list[Tensor]]
    tolerance: float = 0.0
    expected: Callable[[], list[Tensor]] | None = None
    bytes: int | None = None
    capturable: bool = False


def rounding(tensor: Tensor) -> float:
    """The tolerance for float32 sums in another order that are rounded to the dtype of a tensor."""
    return max(torch.finfo(tensor.dtype).eps, 4 * torch.finfo(torch.float32).eps)


def agree(results: list[Tensor], expected: list[Tensor], tolerance: float) -> bool:
    """Whether results differ from the expected ones by at most tolerance times the largest expected magnitude."""
    for result, right in zip(results, expected, strict=True):
        allowed = tolerance * right.float().abs().max()  # float() because booleans have no abs()
        for some, correct in zip(result.flatten().split(COMPARED), right.flatten().split(COMPARED), strict=True):
            if not (some.double() - correct.double()).abs().max() <= allowed:  # NaN does not agree
                return False
    return True


def has_published(p: Problem) -> bool:
    return p.case.dtype == DEFAULT_DTYPE and p.case.entries <= PUBLISHED_ENTRIES


def returning(function: Callable[[], Tensor], **options: Any) -> Implementation:
    """An implementation whose result is what a function returns."""
    returned: list[Tensor] = []

    def run() -> None:
        returned[:] = [function()]

    return Implementation(run, lambda: returned, **options)


def finite_implementations(p: Problem, others: bool = True) -> dict[str, Implementation]:
    return {
        OURS: returning(lambda: dispatched.norm_is_finite([p.grad]), capturable=True),
        DEFINITION: returning(lambda: reference.norm_is_finite([p.grad])),
    }


def compress_implementations(p: Problem, others: bool = True) -> dict[str, Implementation]:
    def build(compress_: Callable[..., object], **options: Any) -> Implementation:
        state = {name: tensor.clone() for name, tensor in p.error_state.items()}
        keys = [state.pop("error_draws")] if "error_draws" in state else []
        run = partial(compress_, [p.grad], [error_of(state)], p.rows, p.slot, keys)
        return Implementation(run, lambda: [p.newest_row(), *(tensor.clone() for tensor in state.values())], **options)

    def composition(grads: list[Tensor], errors: list[Tensor], *others: object) -> None:
        a = errors[0].add_(grads[0]).view(-1, p.case.block_size)
        index = a.abs().topk(p.case.blocks.kept, dim=1, sorted=False).indices
        p.values[:, p.slot] = a.gather(1, index).to(p.values.dtype).unsqueeze(1)
        p.indices[:, p.slot] = index.to(p.indices.dtype).unsqueeze(1)
        a.scatter_(1, index, 0.0)

    lost = 4 * torch.finfo(p.values.dtype).eps  # rounding of kept values, which exceed those left, is not fed back
    implementations = {
        OURS: build(dispatched.compress_, capturable=True),
        DEFINITION: build(reference.compress_),
    }
    if others and p.case.dtype == DEFAULT_DTYPE:
        implementations["torch.topk"] = build(composition, tolerance=lost)
    if others and has_published(p):
        window, slot = RowMajorWindow.of(p.values, p.indices, p.case.block_size), int(p.slot)
        error = p.error_state["error"].clone()
        dense: list[Tensor] = []

        def publish() -> None:
            dense[:] = [window.compress_(p.grad, error, slot)]

        implementations[PUBLISHED] = Implementation(publish, lambda: [*dense, error.clone()], lost)
    return implementations


def dots_implementations(p: Problem, others: bool = True) -> dict[str, Implementation]:
    implementations = {
        OURS: returning(lambda: dispatched.window_dots(p.rows, p.slot), tolerance=1e-9, capturable=True),
        DEFINITION: returning(lambda: reference.window_dots(p.rows, p.slot)),
    }
    if others and p.case.dtype == DEFAULT_DTYPE:
        matrix, newest = p.csr(), p.newest_row()
        implementations["torch.sparse"] = returning(lambda: matrix @ newest, tolerance=FLOAT32_SUMS)
        if has_published(p):
            window = RowMajorWindow.of(p.values, p.indices, p.case.block_size)
            implementations[PUBLISHED] = returning(lambda: window.dots(newest), tolerance=FLOAT32_SUMS)
    return implementations


def apply_implementations(p: Problem, others: bool = True) -> dict[str, Implementation]:
    one = torch.ones((), dtype=torch.float64, device=p.device)

    def build(apply: Callable[[Tensor], object], **options: Any) -> Implementation:
        target = p.target.clone()
        return Implementation(lambda: apply(target), lambda: [target.clone()], **options)

    def ours(window_apply_: Callable[..., None], target: Tensor) -> None:
        window_apply_([target], [], p.rows, Update(p.weights, one, one))

    implementations = {
        OURS: build(partial(ours, dispatched.window_apply_), tolerance=rounding(p.target), capturable=True),
        DEFINITION: build(partial(ours, reference.window_apply_)),
    }
    if others and p.case.dtype == DEFAULT_DTYPE:
        matrix, weights = p.transposed_csr(), p.weights.float()
        implementations["torch.sparse"] = build(
            lambda target: torch.addmv(target, matrix, weights, out=target), tolerance=FLOAT32_SUMS
        )
        if has_published(p):
            window = RowMajorWindow.of(p.values, p.indices, p.case.block_size)
            implementations[PUBLISHED] = build(
                lambda target: target.add_(window.add_(torch.zeros_like(target), weights)), tolerance=FLOAT32_SUMS
            )
    return implementations


def step_implementations(p: Problem, others: bool = True) -> dict[str, Implementation]:
    """Steps with a full window. The damping is the mean of S_ii / m, where no way to compute an update loses digits."""
    gram = p.gram()
    damping = float(gram.diagonal().mean()) / p.case.window
    _, error_dtype, value_dtype = DTYPES[p.case.dtype]

    def param() -> torch.nn.Parameter:
        made = torch.nn.Parameter(torch.zeros_like(p.grad))
        made.grad = p.grad
        return made

    def efcp(backend: str | None, **options: Any) -> Implementation:
        own = param()
        optimizer = SparseMFAC(
            [own],
            LR,
            window=p.case.window,
            density=p.case.density,
            block_size=p.case.block_size,
            damping=damping,
            value_dtype=value_dtype,
            error_dtype=error_dtype,
        )
        with torch.no_grad():
            optimizer.allocate_state()
            made = {"values": p.values, "indices": p.indices, **p.error_state}
            shared = {"gram": gram, "step": torch.tensor(p.case.window)}
            state = optimizer.state_dict()
            state["state"][0].update(made | shared)
            optimizer.load_state_dict(state)
            optimizer.refresh()

        def step() -> None:
            with use_backend(backend):
                optimizer.step()

        return Implementation(step, lambda: [own.detach().clone()], **options)

    def first_order(optimizer: type[SGD] | type[Adam], tensors: int, how: str, **options: Any) -> Implementation:
        own = param()

        def expected() -> list[Tensor]:
            loop = param()
            optimizer([loop], LR, foreach=False, **options).step()
            return [loop.detach()]

        chosen: dict[str, Any] = {how: True, **options}
        run = optimizer([own], LR, **chosen).step
        return Implementation(run, lambda: [own.detach().clone()], 1e-5, expected, tensors * p.grad.nbytes)

    implementations = {
        OURS: efcp(None, tolerance=rounding(p.grad), capturable=True),
        DEFINITION: efcp("reference"),
    }
    if others and p.case.dtype == DEFAULT_DTYPE:
        if has_published(p):
            own = param()
            window = RowMajorWindow.of(p.values, p.indices, p.case.block_size)
            published = PublishedMFAC(own, p.error_state["error"].clone(), window, gram, damping, LR)
            implementations[PUBLISHED] = Implementation(published.step, lambda: [own.detach().clone()], 1e-3)
        for how in (
            ("foreach", "fused") if p.case.numel <= FOREACH_ELEMENTS else ("fused",)
        ):  # gradient read; parameter and moments read and written
            implementations[f"Adam, {how}"] = first_order(Adam, 7, how)
            implementations[f"SGD, {how}"] = first_order(SGD, 5, how, momentum=MOMENTUM)
    return implementations


OPERATIONS: dict[str, Callable[..., dict[str, Implementation]]] = {
    "norm_is_finite": finite_implementations,
    "compress_": compress_implementations,
    "window_dots": dots_implementations,
    "window_apply_": apply_implementations,
    "step": step_implementations,
}
"""By operation, what makes its implementations on a problem: ours, the definition, and, unless told not to, others."""
