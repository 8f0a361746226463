"""The parameters that a step works on: themselves, or of those that are divided over processes what this rank has."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from efcp.adamw import fill_adamw
from efcp.parameter_sets import fill
from efcp.preconditioners import Preconditioner
from efcp.shards import Form, Layout, flattened, form_of, is_hashable
from efcp.windows import Compressor

MOMENTUM_UNIT = 64  # elements to which a scale of a momentum in 8 bits belongs
COUNTERS = ("adam_step", "error_draws")  # the same for all parts


class Member(NamedTuple):
    """A parameter in its param group, as a step takes it.

    Of one that is divided, param, compressor and state are those of this rank's part: a plain tensor, its gradient
    included, and views of what the state of the owner holds.
    """

    owner: Tensor
    group: dict[str, Any]
    param: Tensor
    compressor: Compressor
    state: dict[str, Any]
    layout: Layout | None  # None for one that is whole

    def fill(self, state: dict[str, Any], preconditioner: Preconditioner, taken: set[str], number: int) -> None:
        """Allocates what the owner's state lacks: see `efcp.parameter_sets.fill`."""
        if self.layout is None:
            fill_state(state, self.param, self.group, self.compressor, preconditioner, taken, number)
            return
        own = dict(self.state)
        fill_state(own, self.param, self.group, self.compressor, preconditioner, taken, number)
        forms = forms_of(self.layout, self.param, self.group, self.compressor, preconditioner)
        with torch.inference_mode(False):
            for name in own.keys() - state.keys():
                value = own[name]
                state[name] = self.layout.wrapped(value, forms[name]) if name in forms else value
        state["numel"] = self.owner.numel()


class PartState(dict[str, Any]):
    """The state of a part: views of the tensors in the owner's, and its numbers, which are written to both."""

    def __init__(self, views: dict[str, Any], owner: dict[str, Any]) -> None:
        super().__init__(views)
        self.owner = owner

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        if not isinstance(value, Tensor):
            self.owner[name] = value


def member_of(
    owner: Tensor,
    group: dict[str, Any],
    part: Tensor,
    compressor: Compressor,
    state: dict[str, Any],
    layout: Layout | None,
    preconditioner: Preconditioner,
) -> Member:
    """A member, with the views of its state.

    Args:
        part: the parameter, or this rank's part of it.
        compressor: of parts, where it is divided.
        state: of the owner.
    """
    if layout is not None and "numel" in state:
        views = flattened(state, forms_of(layout, part, group, compressor, preconditioner))
        state = PartState({**views, "numel": part.numel()}, state)
    return Member(owner, group, part, compressor, state, layout)


def forms_of(
    layout: Layout, part: Tensor, group: dict[str, Any], compressor: Compressor, preconditioner: Preconditioner
) -> dict[str, Form]:
    """How each tensor in the state of a divided parameter is divided."""
    options = tuple(group[name] for name in ("window", "direction", "momentum_dtype", "adamw"))
    known = is_hashable(compressor) and is_hashable(preconditioner)
    function = _forms_of if known else _forms_of.__wrapped__
    return function(layout, tuple(part.shape), part.dtype, compressor, preconditioner, *options)


@lru_cache(maxsize=4096)
def _forms_of(
    layout: Layout,
    part: tuple[int, ...],
    dtype: torch.dtype,
    compressor: Compressor,
    preconditioner: Preconditioner,
    window: int,
    direction: str,
    momentum_dtype: str | None,
    adamw: bool,
) -> dict[str, Form]:
    names = ("window", "direction", "momentum_dtype", "adamw", "momentum", "beta1")
    group = dict(zip(names, (window, direction, momentum_dtype, adamw, 0.5, 0.5), strict=True))  # all that may be there
    here: dict[str, Any] = {}
    longest: dict[str, Any] = {}
    for state, shape in ((here, part), (longest, layout.largest)):
        fill_state(state, torch.empty(shape, dtype=dtype, device="meta"), group, compressor, preconditioner, set(), 0)
    forms = {}
    for name, own in here.items():
        if isinstance(own, Tensor) and name not in COUNTERS:
            unit = MOMENTUM_UNIT if name == "momentum_scales" else compressor.unit(name)
            forms[name] = form_of(name, own.shape, longest[name].shape, unit, layout, part)
    return forms


def fill_state(
    state: dict[str, Any],
    param: Tensor,
    group: dict[str, Any],
    compressor: Compressor,
    preconditioner: Preconditioner,
    taken: set[str],
    number: int,
) -> None:
    """Allocates what the state of a parameter or part lacks: of AdamW, or as `efcp.parameter_sets.fill` says."""
    if group["adamw"]:
        fill_adamw(state, param)
    else:
        fill(state, param, group, compressor, preconditioner, taken, number)
