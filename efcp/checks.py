"""Checks of arguments: errors that name the argument, what is allowed, and the value."""

import math
from typing import Any

import torch
from torch import Tensor


def require(condition: bool, name: str, allowed: str, value: Any) -> None:
    """Raises ValueError("{name} must {allowed}, got {value}") unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} must {allowed}, got {value!r}")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def require_number(name: str, value: Any, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """Raises ValueError unless value is a number in [low, high), or in (low, high) where `open_low`."""
    inside = is_number(value) and low <= value < high and not (open_low and value == low)
    if high < float("inf"):
        allowed = f"lie in {'(' if open_low else '['}{low:g}, {high:g})"
    else:
        allowed = f"be a finite number {'>' if open_low else '≥'} {low:g}"
    require(inside, name, allowed, value)


def require_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raises ValueError unless value is an integer from low to high."""
    inside = isinstance(value, int) and not isinstance(value, bool) and low <= value and (high is None or value <= high)
    require(inside, name, f"be an integer ≥ {low}" if high is None else f"be an integer from {low} to {high}", value)


def require_betas(value: Any) -> None:
    """Raises ValueError unless value is a pair of numbers in [0, 1)."""
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    inside = pair and all(is_number(beta) and 0 <= beta < 1 for beta in value)
    require(inside, "betas", "be two numbers in [0, 1)", value)


def require_dtype(name: str, value: Any, allowed: tuple[torch.dtype, ...]) -> torch.dtype:
    """The dtype that value is or names, as in "float32". Raises ValueError unless it is one of those allowed."""
    dtype = next((d for d in allowed if value in (d, plain(d))), None)
    if dtype is None:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    return dtype


def plain(value: Any) -> Any:
    """A dtype's name, as in "float32"; a list for a tuple, as checkpoints give it back; any other value as it is."""
    if isinstance(value, tuple):
        return list(value)
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def from_plain(value: Any) -> Any:
    """The dtype that a name such as "float32" stands for; any other value as it is."""
    dtype = getattr(torch, value, None) if isinstance(value, str) else None
    return dtype if isinstance(dtype, torch.dtype) else value


def check_content(where: str, name: str, holds: bool | Tensor, allowed: str) -> None:
    """Raises ValueError unless what a state holds is allowed."""
    if not holds:
        raise ValueError(f"{where}: {name} must {allowed}; the state is damaged")


def check_numbers(where: str, state: dict[str, Any]) -> None:
    """Checks that tensors are finite, and that numbers are, and not negative."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            check_content(where, name, value.isfinite().all(), "be finite")
        else:
            check_content(where, name, 0 <= value < math.inf, "be finite and not negative")
