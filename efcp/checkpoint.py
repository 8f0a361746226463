"""Loading state: refused if it does not fit the optimizer, else taken over bit for bit.

`torch.optim.Optimizer.load_state_dict` casts floating-point and integer state to the dtype of the parameter. In
bfloat16, indices above 256 are lost, and so is the precision of float64 matrices.

Every loaded tensor is checked: kernels use positions as addresses, and one NaN would stay for good.

Versions of the state, in `version` of what all parameters share:

    0  without a version: no numel, skipped_in_a_row, imprecise_steps and pending; dtypes themselves in param groups
    1  dtypes by name in param groups
"""

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from efcp.checks import plain

VERSION = 1  # of the states that are written
NAMED = 3  # in a warning
COUNTERS = ("step", "skipped_steps", "skipped_in_a_row", "imprecise_steps")
SINCE_VERSION_1 = ("skipped_in_a_row", "imprecise_steps", "pending", "version")
WINDOWS_OF_VERSION_0 = {"values", "left", "rows"}


class HasOptions(Protocol):
    """A compressor or a preconditioner."""

    @property
    def options(self) -> dict[str, Any]: ...


class Exact:
    """A parameter's state on its way through `Optimizer.load_state_dict`, which casts tensors but leaves this alone."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def on(self, device: torch.device) -> dict[str, Any]:
        """A copy of the state on a device, contiguous."""
        return _copied(self.state, device)


def _copied(value: Any, device: torch.device) -> Any:
    """A copy with all tensors on the device; what wrappers keep may be nested."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True, memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {key: _copied(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item, device) for item in value)
    return value


def check_state_names(part: HasOptions, state: dict[str, Any], taken: set[str]) -> None:
    """Raises ValueError if a compressor or preconditioner gives its state names that are used for other things."""
    if clash := sorted(taken & state.keys()):
        raise ValueError(f"the state of {type(part).__name__} must not have names that are taken: {', '.join(clash)}")


def check_same(where: str, name: str, saved: Any, own: Any) -> None:
    """Raises ValueError unless a thing is the same in the state and in the optimizer."""
    if saved != own:
        raise ValueError(f"{where}: {name} is {saved!r} in the state, but {own!r} in the optimizer")


def check_structure(state_dict: dict[str, Any]) -> None:
    """Checks that there are param groups with distinct parameters, and states of these only.

    Keys of a type that does not stand for parameters are skipped: wrappers keep state of their own there.
    """
    groups, states = state_dict.get("param_groups"), state_dict.get("state")
    well_formed = (
        isinstance(groups, list)
        and isinstance(states, dict)
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
    )
    if not (well_formed and isinstance(groups, list) and isinstance(states, dict)):
        raise ValueError("state_dict: not the state of an optimizer")
    keys = [key for group in groups for key in group["params"]]
    if not all(isinstance(states.get(key, {}), dict) for key in keys):
        raise ValueError("state_dict: not the state of an optimizer")
    if len(set(keys)) < len(keys):
        raise ValueError("state_dict: a parameter is in the param groups twice")
    types = {int, *map(type, keys)}
    if unknown := [key for key in states.keys() - set(keys) if type(key) in types]:
        raise ValueError(f"state_dict: there is state of {len(unknown)} parameters that are in no param group")


def check_version(states: Iterable[dict[str, Any]]) -> None:
    """Raises ValueError where one of the parameters' states is of a version that is not known here."""
    for state in states:
        version = state.get("version", 0)
        if not isinstance(version, int) or version < 0:
            raise ValueError(f"state_dict: version must be an integer ≥ 0, got {version!r}; the state is damaged")
        if version > VERSION:
            raise ValueError(
                f"state_dict: it was saved by a later release: its version is {version}, here it is {VERSION}"
            )


def check_kind(where: str, saved: dict[str, Any], part: HasOptions) -> None:
    """Checks that a saved param group has an option of a compressor or preconditioner, if that has any."""
    if part.options and not part.options.keys() & saved.keys():
        names = ", ".join(part.options)
        raise ValueError(f"{where}: the state has no {names}; it was saved by another kind of optimizer")


def with_defaults(saved: dict[str, Any], own: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A saved param group, completed: options that it lacks have their defaults, other entries the optimizer's values.

    Dtypes become names, as they are written now. Names of parameters stay the optimizer's, where it knows any.
    """
    completed = {**own, **defaults, **saved}
    if "param_names" in own:
        completed["param_names"] = own["param_names"]
    return {name: plain(value) if name in defaults else value for name, value in completed.items()}


def check_fixed(where: str, saved: dict[str, Any], own: dict[str, Any], fixed: Iterable[str]) -> None:
    """Checks that a saved param group has the optimizer's values of the options that cannot change."""
    for name in fixed:
        check_same(where, name, saved[name], plain(own[name]))


def other_names(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> str:
    """Says which parameters have other names in saved param groups than in the optimizer's; empty where none have."""
    groups = ((g.get("param_names", ()), h.get("param_names", ())) for g, h in zip(saved, own, strict=True))
    pairs = (pair for theirs, ours in groups for pair in zip(theirs, ours, strict=False))
    different = [f"{theirs!r} goes to {ours!r}" for theirs, ours in pairs if theirs != ours]
    if not different:
        return ""
    others = f" and so on, {len(different)} in all" if len(different) > NAMED else ""
    what = ", that of ".join(different[:NAMED])
    return f"param_groups: parameters are matched by their order, but of the saved states that of {what}{others}"


def upgraded(saved: dict[str, Any], shared: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """A parameter's saved state as this version would have written it.

    Args:
        saved: the state, which stays as it is.
        shared: the shared state that this parameter's state should hold; empty if another parameter holds it.
        param: the parameter.
    """
    state = dict(saved)
    if not WINDOWS_OF_VERSION_0.isdisjoint(state):
        state.setdefault("numel", param.numel())
    if shared and "version" not in state:
        for name in SINCE_VERSION_1:
            if name in shared:
                is_counter = isinstance(shared[name], Tensor)
                state.setdefault(name, torch.zeros((), dtype=torch.int64, device="cpu") if is_counter else shared[name])
    for name in COUNTERS:
        value = state.get(name)
        if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.dim() == 0):
            given = value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
            counter = given.to(torch.int64)
            state[name] = counter if counter == given else value
    return state


def check_tensors(where: str, saved: dict[str, Any], expected: dict[str, Any]) -> None:
    """Checks names, shapes and dtypes of a parameter's saved state.

    Args:
        where: for messages.
        saved: the state. What other software has put there stays.
        expected: what the state must hold; tensors may be on the meta device.
    """
    if missing := sorted(expected.keys() - saved.keys()):
        raise ValueError(f"{where}: the state has no {', '.join(missing)}; it is damaged, or of another kind")
    for name, own in expected.items():
        value = saved[name]
        if isinstance(own, Tensor) and isinstance(value, Tensor):
            check_same(where, f"the shape of {name}", tuple(value.shape), tuple(own.shape))
            check_same(where, f"the dtype of {name}", value.dtype, own.dtype)
            check_same(where, f"the layout of {name}", value.layout, own.layout)
        else:
            check_same(where, f"the type of {name}", type(value).__name__, type(own).__name__)
            if name == "numel":
                check_same(where, "the number of elements", value, own)


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
