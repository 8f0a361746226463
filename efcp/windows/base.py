"""Windows: the last m compressed gradients of some parameters, as the rows of G.

A compressor is a set of options, such as `TopK(density=0.01)`, that are the same for all parameters of a group. From
their states, dicts of tensors, it makes a window, which knows how to take in gradients, and how to do the two things
that preconditioning needs: inner products with the newest row, and a weighted sum of all rows.

A new compressor, in this package or outside, is a subclass of `Compressor` and one of `Window`; or of `SingleWindow`,
which knows one parameter only, with `Separate` for all of them. `examples/custom_compressor.py` is a complete one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from efcp.checks import check_numbers, plain, require_dtype
from efcp.kernels import LowBit, Momenta, Update, accumulation_dtype, add_lowbit_, allocate_lowbit
from efcp.shards import Layout


class Window(ABC):
    """The last m compressed gradients of parameters that are stepped together; a view of tensors in their states."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows, m."""

    @abstractmethod
    def push(self, grads: Sequence[Tensor | None], slot: Tensor, finite: Tensor) -> None:
        """Compresses gradients into row `slot`.

        Args:
            grads: of each parameter (n,) contiguous, never changed; None makes its part of the row zero.
            slot: (1,) int64, on the gradients' device.
            finite: () bool, on the gradients' device; where false, the row becomes zero and all else stays as it was,
                up to one rounding of errors.
        """

    def push_unchecked(self, grads: Sequence[Tensor | None], slot: Tensor) -> Tensor | None:
        """Compresses gradients before it is known whether they are finite, for windows that can take it back.

        Args:
            grads: as in `push`.
            slot: as in `push`.

        Returns:
            () bool: whether the norm of these gradients is finite. `settle` has to follow. None where the window has
            done nothing and `push` has to follow.
        """
        return None

    def settle(self, grads: Sequence[Tensor | None], slot: Tensor, finite: Tensor) -> None:
        """Takes back what `push_unchecked` has done where not finite, () bool, as `push` leaves it there."""
        raise NotImplementedError(f"{type(self).__name__} cannot take a push back")

    @abstractmethod
    def dots(self, slot: Tensor, momenta: Momenta = ()) -> Tensor:
        """The inner products of all rows with row `slot`, summed in float64 from what is stored.

        Args:
            slot: (1,) int64, on the window's device.
            momenta: of each parameter n numbers, floating point or in 8 bits; or empty.

        Returns:
            (m,) float64, summed over the parameters; with momenta (2, m), the products with these second.
        """

    @abstractmethod
    def apply_(self, targets: Sequence[Tensor | None], momenta: Momenta, update: Update) -> None:
        """Adds the weighted sum of the rows to parameters, as `kernels.Update` says.

        Args:
            targets: of each parameter (n,) contiguous, changed in place; None stays as it is.
            momenta: of each parameter n numbers, floating point or in 8 bits; changed in place where the target is, and
                the update says so. Empty for none.
            update: float64, on the targets' device.
        """


class SingleWindow(ABC):
    """The last m compressed gradients of one parameter of n elements; a view of the tensors in its state.

    `Separate` makes a `Window` of several. Numbers that it is given are tensors on the parameter's device, so that
    nothing waits for an accelerator.
    """

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows, m."""

    @abstractmethod
    def push(self, grad: Tensor, slot: Tensor, finite: Tensor) -> None:
        """Compresses a gradient into row `slot`, with the error where there is error feedback, and updates the error.

        Args:
            grad: (n,) contiguous, never changed; of any real floating-point dtype.
            slot: (1,) int64, as `Tensor.index_copy_` takes it.
            finite: () bool; where false, grad may hold Inf or NaN: the row becomes zero, and all else stays as it was.
        """

    @abstractmethod
    def clear(self, slot: Tensor) -> None:
        """Makes row `slot` zero, (1,) int64: the parameter has had no gradient."""

    @abstractmethod
    def dots(self, slot: Tensor) -> Tensor:
        """The inner products of all rows with row `slot`, summed in float64 from what is stored.

        Args:
            slot: (1,) int64.

        Returns:
            (m,) float64.
        """

    def products(self, vector: Tensor) -> Tensor:
        """The inner products of all rows with a vector, summed in float64. Needed for the direction "momentum" only.

        Args:
            vector: (n,) contiguous, floating point.

        Returns:
            (m,) float64.
        """
        raise NotImplementedError(f"{type(self).__name__} has no products, which the direction 'momentum' needs")

    def squares(self, weights: Tensor) -> Tensor:
        """Σᵢ weightsᵢ · Gᵢ², entry by entry. Needed for preconditioners with square_weights only.

        Args:
            weights: (m,) float64.

        Returns:
            (n,) floating point.
        """
        raise NotImplementedError(f"{type(self).__name__} has no squares, which square_weights need")

    @abstractmethod
    def apply_(self, target: Tensor, weights: Tensor, factor: Tensor) -> None:
        """target ← factor · target + Σᵢ weightsᵢ · Gᵢ.

        Args:
            target: (n,) contiguous, changed in place; of any real floating-point dtype, also another than the rows'.
            weights: (m,) float64.
            factor: () float64.
        """


@dataclass(frozen=True)
class Separate(Window):
    """Windows of several parameters, each treated by itself."""

    windows: list[SingleWindow]

    def __len__(self) -> int:
        return len(self.windows[0])

    def push(self, grads: Sequence[Tensor | None], slot: Tensor, finite: Tensor) -> None:
        for window, grad in zip(self.windows, grads, strict=True):
            if grad is None:
                window.clear(slot)
            else:
                window.push(grad, slot, finite)

    def dots(self, slot: Tensor, momenta: Momenta = ()) -> Tensor:
        dots = reduce(torch.add, (window.dots(slot) for window in self.windows))
        if not momenta:
            return dots
        pairs = zip(self.windows, momenta, strict=True)
        return torch.stack([dots, reduce(torch.add, (window.products(floats(x)) for window, x in pairs))])

    def apply_(self, targets: Sequence[Tensor | None], momenta: Momenta, update: Update) -> None:
        for number, (window, target) in enumerate(zip(self.windows, targets, strict=True)):
            if target is None:
                continue
            if update.square_weights is None and update.momentum_factor is None:
                window.apply_(target, update.update_factor * update.weights, update.target_factor)
                continue
            dtype = accumulation_dtype(target.dtype)
            total = momenta[number] if momenta else torch.zeros_like(target, dtype=dtype)
            if isinstance(total, LowBit) or not update.writes_momenta:
                total = floats(total, copy=bool(momenta), dtype=dtype)
            factor = torch.ones_like(update.target_factor) if update.momentum_factor is None else update.momentum_factor
            if update.square_weights is None or update.eps is None:
                window.apply_(total, update.weights, factor)
            else:
                rows = torch.zeros_like(target, dtype=dtype)
                window.apply_(rows, update.weights, factor)
                rows /= window.squares(update.square_weights).sqrt_() + update.eps.to(dtype)
                total.copy_(total.to(dtype) * factor.to(dtype) + rows)
            target.mul_(update.target_factor).addcmul_(total, update.update_factor)


@dataclass(frozen=True)
class Compressor(ABC):
    """Options of a window. They become options of the param groups, where each group may have its own.

    A subclass is a frozen dataclass, its options are its fields, and `__post_init__` may check them. It is made anew
    from the options of a param group whenever these are used, so options are plain values: what `torch.load` reads with
    weights_only, or dtypes, which param groups hold by name. Their names must differ from those of `EFCP` and of the
    preconditioner.
    """

    @property
    def options(self) -> dict[str, Any]:
        """The options as plain values, with dtypes by their names, so that param groups can be saved anywhere."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}

    @abstractmethod
    def allocate(self, param: Tensor, window_size: int) -> dict[str, Tensor]:
        """New state for a parameter: tensors of a window of zero rows, on the parameter's device.

        All that the window keeps from one step to the next is in it. The error, where there is error feedback, is
        called `error` and has the parameter's number of elements. The names numel, momentum and average are taken, and
        so are those of the Gram matrix (`efcp.gram`) and of the preconditioner.

        Names, shapes and dtypes depend on the options, the parameter's shape and dtype, and the window alone: on the
        meta device this gives them without the memory, to estimate it and to check states that are loaded.
        """

    @abstractmethod
    def row_names(self, param: Tensor) -> tuple[str, ...]:
        """The names of the tensors that hold the rows, at least one of those that `allocate` gives.

        By these a step notices that somebody else has written, removed or replaced a window.
        """

    def of_parts(self, layout: Layout) -> "Compressor":
        """The compressor for the parts of a parameter that is divided over processes, each a parameter of its own.

        It must keep tensors of the same names for all parts. By itself it is this one.

        Raises:
            ValueError: where such a parameter cannot be compressed.
        """
        return self

    def unit(self, name: str) -> int | None:
        """The number of consecutive elements of a parameter that an entry of a state tensor's first dimension is of.

        Checkpoints of such tensors can be loaded on another number of processes. None where there is no such number.
        """
        return None

    def check_shape(self, name: Callable[[], str], state: dict[str, Any], param: Tensor) -> None:  # noqa: B027
        """Raises ValueError unless a state is one for the shape of a parameter; their numbers of elements are the same.

        Args:
            name: gives the name of the parameter, for errors.
        """

    def check(self, where: str, state: dict[str, Any], param: Tensor) -> None:
        """Raises ValueError unless a parameter's saved state, of the right names, shapes and dtypes, makes sense.

        By itself it asks that all numbers are finite. A window whose state holds positions should check these too.

        Args:
            where: the parameter's place in the state, for messages.
        """
        check_numbers(where, state)

    def error(self, state: dict[str, Any]) -> Tensor | None:
        """The error in a parameter's state as floating point, (n,); None where there is none."""
        error = error_of(state)
        return None if error is None else floats(error, numel=state["numel"])

    @abstractmethod
    def bind(self, states: Sequence[dict[str, Tensor]], params: Sequence[Tensor]) -> Window:
        """The window of parameters with these states, which have been made by `allocate` or loaded.

        Raises:
            ValueError: where a state is for other options, as after an edit of the param group.
        """


def error_of(state: dict[str, Any]) -> Tensor | LowBit | None:
    """The error in a parameter's state, floating point or in few bits; None where there is none."""
    if "error_codes" in state:
        return LowBit(state["error_codes"], state["error_scales"])
    return state.get("error")


def floats(
    numbers: Tensor | LowBit, *, numel: int | None = None, copy: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """Numbers as floating point: themselves where they are, unless another dtype or a copy is asked for.

    Args:
        numel: how many they are, where they are in 4 bits.
        dtype: None takes float32 for few bits.
    """
    if isinstance(numbers, Tensor):
        return numbers.to(dtype or numbers.dtype, copy=copy)
    size, device = numel or numbers.codes.numel(), numbers.codes.device
    decoded = torch.zeros(size, dtype=dtype or torch.float32, device=device)
    add_lowbit_([decoded], [numbers])
    return decoded


BITS = {torch.int8: 8, torch.int4: 4}  # type: ignore[attr-defined]  # of an error
ERROR_DTYPES = (torch.bfloat16, torch.float32, torch.float64, *BITS)


def allocate_error(
    numel: int, dtype: torch.dtype, device: torch.device, block_size: int | None = None
) -> dict[str, Tensor]:
    """State for an error of n zeros: `error` (n,); or `error_codes` and `error_scales`, and `error_draws` in 4 bits.

    Args:
        dtype: one of ERROR_DTYPES.
        block_size: how many elements are rounded to few bits by themselves; None for all together.
    """
    if dtype not in BITS:
        return {"error": torch.zeros(numel, dtype=dtype, device=device)}
    numbers = allocate_lowbit(numel, BITS[dtype], device, block_size)
    state = {"error_codes": numbers.codes, "error_scales": numbers.scales}
    if BITS[dtype] == 4:
        state["error_draws"] = torch.zeros(1, dtype=torch.int64, device=device)
    return state


def choose_dtypes(options: Any) -> None:
    """Checks the options `value_dtype` and `error_dtype` of a compressor, and turns names into dtypes.

    Raises:
        ValueError: for dtypes that are not allowed.
    """
    allowed = {
        "value_dtype": (torch.bfloat16, torch.float32),
        "error_dtype": ERROR_DTYPES,
    }
    for name, dtypes in allowed.items():
        value = getattr(options, name)
        if value is not None or name == "value_dtype":
            object.__setattr__(options, name, require_dtype(name, value, dtypes))  # the class is frozen
