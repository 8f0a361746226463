"""Loading state: refused if it does not fit the optimizer, else taken over bit for bit.

`torch.optim.Optimizer.load_state_dict` casts floating-point and integer state to the dtype of the parameter. In
bfloat16, indices above 256 are lost, and so is the precision of float64 matrices.

Every loaded tensor is checked: kernels use positions as addresses, and one NaN would stay for good.

Versions of the state, in `version` of what all parameters share:

    0  without a version: no numel, skipped_in_a_row, imprecise_steps and pending; dtypes themselves in param groups
    1  dtypes by name in param groups; no factor, update_norm and inner_product
    2  as now
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, fields
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from efcp.checks import check_numbers, plain
from efcp.gram import check_gram
from efcp.members import fill_state, forms_of
from efcp.options import check_keys, check_options, made_from
from efcp.parameters import check_divided_state
from efcp.preconditioners import Preconditioner
from efcp.shards import ELEMENTWISE, Form, Layout, flattened, is_sharded, local, own_part, with_local
from efcp.shared_state import VERSION, allocate_shared
from efcp.windows import Compressor

NAMED = 3  # in a warning
FIXED = ("window", "direction", "momentum_dtype", "adamw")  # options that determine the state
FROM_OWN = ("param_names", "aligned")  # entries of param groups that stay the optimizer's
COUNTERS = ("step", "skipped_steps", "skipped_in_a_row", "imprecise_steps")
SINCE_VERSION_1 = ("skipped_in_a_row", "imprecise_steps", "pending")
WINDOWS_OF_VERSION_0 = {"values", "left", "rows"}


def checked(
    state_dict: dict[str, Any],
    own_groups: Sequence[dict[str, Any]],
    compressor: Compressor,
    preconditioner: Preconditioner,
    defaults: dict[str, Any],
    optimizer: str,
    layout_of: Callable[[dict[str, Any], Compressor, Tensor], tuple[Layout | None, Compressor]],
) -> dict[str, Any]:
    """A state dict as this version would have written it, its tensors protected from casting by `Exact`.

    Args:
        state_dict: the state to load, which stays as it is.
        own_groups: the param groups of the optimizer that loads it.
        compressor, preconditioner: of that optimizer.
        defaults: of the options that are neither's.
        optimizer: its name, for messages.
        layout_of: says how a parameter is divided, and gives the compressor of its parts.

    Raises:
        ValueError: if the state does not fit the optimizer, or is damaged.
    """
    check_structure(state_dict)
    check_same("state_dict", "the number of param groups", len(state_dict["param_groups"]), len(own_groups))
    groups, states = [], dict[Any, dict[str, Any]]()
    shared = allocate_shared(own_groups[0]["window"], preconditioner, torch.device("meta"))
    defaults = {**defaults, **_defaults(compressor), **_defaults(preconditioner)}
    names = (*defaults, *compressor.options, *preconditioner.options)
    params = {key for group in state_dict["param_groups"] for key in group["params"]}
    check_version(saved for key, saved in state_dict["state"].items() if key in params)
    homes = [key for key, saved in state_dict["state"].items() if key in params and "gram" in saved]
    for number, (saved_group, group) in enumerate(zip(state_dict["param_groups"], own_groups, strict=True)):
        where = f"param_groups[{number}]"
        of_group = made_from(compressor, group)
        check_same(where, "the number of parameters", len(saved_group["params"]), len(group["params"]))
        for options in (of_group, preconditioner):
            check_kind(where, saved_group, options)
        check_keys(where, optimizer, saved_group.items(), names)
        loaded = with_defaults(saved_group, group, defaults)
        fixed = [name for name in (*FIXED, *compressor.options, *preconditioner.fixed) if name not in FROM_OWN]
        check_fixed(where, loaded, group, fixed)
        groups.append(loaded)
        for position, (key, p) in enumerate(zip(saved_group["params"], group["params"], strict=True)):
            here = f"{where}, parameter {position}"
            if key not in state_dict["state"]:
                continue
            saved = upgraded(state_dict["state"][key], shared if key in homes else {}, p)
            expected = dict(shared) if key in homes else {}
            layout, of_part = layout_of(loaded, of_group, p)
            part = torch.empty_like(p if layout is None else own_part(p.detach(), layout), device="meta")
            forms: dict[str, Form] = {}
            if "numel" in saved:
                used = {**loaded, "momentum": float("momentum" in saved), "beta1": float("average" in saved)}
                fill_state(expected, part, used, of_part, preconditioner, set(shared), 0)
                if layout is not None:
                    forms = forms_of(layout, part, loaded, of_part, preconditioner)
                    expected["numel"] = p.numel()
                    for name in forms.keys() & expected.keys():
                        expected[name] = torch.empty(forms[name].whole, dtype=expected[name].dtype, device="meta")
                if layout is None or layout.mesh is None:
                    saved = of_one_process(saved, expected, p)
                if layout is not None:
                    check_divided_state(partial(str, here), saved, forms, layout)
            check_tensors(here, saved, expected)
            if key in homes:
                check_gram(here, {name: saved[name] for name in shared})
            if "numel" in saved:
                own = flattened({name: saved[name] for name in expected.keys() - shared.keys()}, forms)
                check_numbers(here, own)
                if not loaded["adamw"]:
                    of_part.check(here, own, part)
            states[key] = saved
    if len(homes) != 1 and (homes or any("numel" in saved and "exp_avg" not in saved for saved in states.values())):
        raise ValueError(f"state_dict: there must be one Gram matrix, got {len(homes)}; the state is damaged")
    check_options(groups, compressor, preconditioner)
    others = {key: saved for key, saved in state_dict["state"].items() if key not in params}
    exact = {key: Exact(saved) for key, saved in states.items()}
    return {**state_dict, "param_groups": groups, "state": {**others, **exact}}


def _defaults(part: Compressor | Preconditioner) -> dict[str, Any]:
    """The defaults of the options that have one; those of a user's compressor or preconditioner need not."""
    return {field.name: plain(field.default) for field in fields(part) if field.default is not MISSING}


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
    if is_sharded(value):
        return with_local(value, _copied(local(value), device))
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True, memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {key: _copied(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item, device) for item in value)
    return value


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
    """Checks that a saved param group has the first option of a compressor or preconditioner, if that has any.

    Others may be of a later version, or of several kinds.
    """
    if part.options and next(iter(part.options)) not in saved:
        raise ValueError(
            f"{where}: the state has no {next(iter(part.options))}; it was saved by another kind of optimizer"
        )


def with_defaults(saved: dict[str, Any], own: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A saved param group, completed: options that it lacks have their defaults, other entries the optimizer's values.

    Dtypes become names, as they are written now. Names of parameters stay the optimizer's, where it knows any.
    """
    completed = {**own, **defaults, **saved}
    completed |= {name: own[name] for name in FROM_OWN if name in own}
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
    if shared:
        for name in SINCE_VERSION_1 if "version" not in state else ():
            if name in shared:
                is_counter = isinstance(shared[name], Tensor)
                state.setdefault(name, torch.zeros((), dtype=torch.int64, device="cpu") if is_counter else shared[name])
        state["version"] = shared["version"]
    if shared and "update_norm" not in state and {"gram", "weights", "step"} <= state.keys():
        weights, product = state["weights"], state["gram"] @ state["weights"]
        newest = (int(state["step"]) - 1) % len(weights)
        state |= {"factor": torch.zeros_like(product[0]), "inner_product": product[newest].clone()}
        state["update_norm"] = torch.dot(weights, product).clamp(min=0).sqrt()
    for name in COUNTERS:
        value = state.get(name)
        if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.dim() == 0):
            given = value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
            counter = given.to(torch.int64)
            state[name] = counter if counter == given else value
    return state


def of_one_process(saved: dict[str, Any], expected: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """A saved state with what has a number for each element shaped as expected: as the parameter, or flat.

    Of parameters that were divided, such tensors have the parameter's shape.
    """
    shape = tuple(param.shape)
    state = dict(saved)
    for name in {*ELEMENTWISE, "rows"} & expected.keys():
        value, own = saved.get(name), expected[name]
        first = own.shape[:1] if name == "rows" else ()  # m
        alike = {(*first, *shape), (*first, param.numel())}
        if isinstance(value, Tensor) and not is_sharded(value) and {tuple(value.shape), tuple(own.shape)} == alike:
            state[name] = value.reshape(own.shape)
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
