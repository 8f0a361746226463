"""The options of param groups: their values, and which other keys may be there, but no misspelt option.

Schedulers, wrappers and users put keys of their own into param groups (`initial_lr`, `rho`, `layer_id`), as
`torch.optim` lets them. A misspelt option would silently do nothing, so it is an error. So is an option of a compressor
that has the name of another's.
"""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from efcp.checks import from_plain, plain, require, require_betas, require_dtype, require_integer, require_number
from efcp.directions import DIRECTIONS
from efcp.preconditioners import LocalPreconditioner, Preconditioner
from efcp.windows import Compressor

OPTIONS = (  # of every optimizer
    *("lr", "window", "direction", "momentum", "beta1", "weight_decay", "update_rms", "max_update_norm"),
    *("momentum_dtype", "maximize", "adamw"),
)
AGREED = ("window", "direction", "update_rms", "max_update_norm")  # in all param groups
MOMENTUM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)

HASHABLE = (bool, int, float, str, torch.dtype)  # types of most options
FLAGS = ("foreach", "fused", "capturable", "differentiable")  # of torch.optim; frameworks set them everywhere
LETTERS_PER_EDIT = 5  # of an option's name, for each edit that counts as a slip


Kind = TypeVar("Kind", Compressor, Preconditioner)


def made_from(part: Kind, group: dict[str, Any]) -> Kind:
    """A compressor or preconditioner of the same kind, with the options of a param group."""
    names = tuple(field.name for field in fields(part))
    values = [group[name] for name in names]
    if torch.compiler.is_compiling() or not all(value is None or type(value) in HASHABLE for value in values):
        return _new(type(part), names, *values)
    return _made(type(part), names, *values)


def _new(kind: type[Kind], names: Sequence[str], *values: Any) -> Kind:
    return kind(**dict(zip(names, map(from_plain, values), strict=True)))


_made = lru_cache(typed=True)(_new)  # a step asks several times, and parts are frozen; True is not 1


def agreed(groups: Sequence[dict[str, Any]], name: str) -> Any:
    """The value of an option.

    Raises:
        ValueError: where param groups do not agree on it.
    """
    values = [plain(group[name]) for group in groups]  # schedulers write tuples
    require(all(v == values[0] for v in values), name, "be the same in all param groups", values)
    return values[0]


def agreed_preconditioner(groups: Sequence[dict[str, Any]], kind: Preconditioner) -> Preconditioner:
    """The preconditioner with the options on which all param groups must agree, but for those that AdamW steps."""
    windowed = [group for group in groups if not group["adamw"]] or groups[:1]
    return made_from(kind, {name: agreed(windowed, name) for name in kind.options})


def check_options(groups: Sequence[dict[str, Any]], compressor: Compressor, preconditioner: Preconditioner) -> None:
    """Checks the options of all param groups together.

    Raises:
        ValueError: for values that are not allowed, and where groups must agree and do not.
    """
    for group in groups:
        lr = group["lr"]
        if isinstance(lr, Tensor):
            require(lr.numel() == 1, "lr", "have one element", lr)
        else:
            require_number("lr", lr, 0)
        require_number("momentum", group["momentum"], 0, 1)
        require_number("beta1", group["beta1"], 0, 1)
        require_number("weight_decay", group["weight_decay"], 0)
        require_integer("window", group["window"], 1)
        require(isinstance(group["maximize"], bool), "maximize", "be True or False", group["maximize"])
        for name in ("max_update_norm", "update_rms"):
            if group[name] is not None:
                require_number(name, group[name], 0, open_low=True)
        if group["update_rms"] is not None:
            allowed = "be None where update_rms gives updates their length"
            require(group["max_update_norm"] is None, "max_update_norm", allowed, group["max_update_norm"])
        direction, dtype = group["direction"], group["momentum_dtype"]
        require(direction in DIRECTIONS, "direction", f"be one of {', '.join(DIRECTIONS)}", direction)
        if direction != "row":
            require(group["beta1"] == 0, "beta1", f"be 0 with direction {direction!r}", group["beta1"])
        if dtype is not None:
            dtype = require_dtype("momentum_dtype", dtype, MOMENTUM_DTYPES)
            allowed = "be a floating point dtype, or None, where momentum is that of the update"
            require(dtype != torch.int8 or direction == "momentum", "momentum_dtype", allowed, dtype)
        require(isinstance(group["adamw"], bool), "adamw", "be True or False", group["adamw"])
        if group["adamw"]:
            require_betas(group["betas"])
        made_from(compressor, group)
    for name in AGREED:
        agreed(groups, name)
    if groups[0]["direction"] == "average":
        agreed(groups, "momentum")
    agreed_preconditioner(groups, preconditioner).check_direction(groups[0]["direction"])
    preconditioner.check_compressor(compressor)
    kind = type(preconditioner).__name__
    if isinstance(preconditioner, LocalPreconditioner):
        require(groups[0]["update_rms"] is not None, "update_rms", f"be a number with {kind}", None)
    elif not preconditioner.gives_length:
        for name in ("update_rms", "max_update_norm"):
            allowed = f"be None with {kind}, which does not know the length of an update before it is taken"
            require(groups[0][name] is None, name, allowed, groups[0][name])


def check_parts(compressor: Compressor, preconditioner: Preconditioner) -> None:
    """Checks that param groups can hold the options of a compressor and a preconditioner, which may be a user's own.

    Raises:
        TypeError: for something else, and for one that cannot be made from its options.
        ValueError: where two of them have an option of the same name.
    """
    taken = {*OPTIONS, "params", "param_names"}
    for part, base in ((compressor, Compressor), (preconditioner, Preconditioner)):
        name = base.__name__.lower()
        if not isinstance(part, base):
            raise TypeError(f"{name} must be an instance of a subclass of efcp.{base.__name__}, got {part!r}")
        arguments = inspect.signature(type(part)).parameters.keys()
        if arguments != part.options.keys():
            raise TypeError(
                f"{name} must be of a frozen dataclass whose fields are its arguments, but {type(part).__name__} has "
                f"the fields ({', '.join(part.options)}) and takes ({', '.join(arguments)})"
            )
        if clash := sorted(taken & part.options.keys()):
            raise ValueError(f"{name} must not have options named {', '.join(clash)}, which param groups have already")
        taken |= part.options.keys()


def check_keys(where: str, optimizer: str, group: Iterable[tuple[str, Any]], options: tuple[str, ...]) -> None:
    """Checks the keys of a param group.

    Args:
        where: the group, for messages.
        optimizer: the name of the optimizer, for messages.
        group: keys and values.
        options: the names of all options.

    Raises:
        ValueError: for a misspelt option, and for a flag that is on.
    """
    for key, value in group:
        if key in FLAGS and value not in (False, None):
            raise ValueError(f"{where}: {key} must be False or None, got {value!r}; {optimizer} has one implementation")
        if (meant := misspelt(str(key), options)) is not None:
            names = ", ".join(options)
            raise ValueError(f"{where}: {optimizer} has no option {key}, did you mean {meant}? Its options are {names}")


@lru_cache  # there may be thousands of groups with the same keys
def misspelt(key: str, options: tuple[str, ...]) -> str | None:
    """The option whose name `key` is with a slip: one edit for each `LETTERS_PER_EDIT` letters of the name.

    Case and underscores are ignored. Names of fewer than five letters must match exactly: `betas` is not `beta1`. With
    more edits other words would be near: `dampening` and `mapping` are two from `damping`, `moments` from `momentum`. A
    key that has all words of an option and others, such as `weight_decay_1d`, is another name, made on purpose.
    """
    if key in options:
        return None
    for option in options:
        letters = sum(map(str.isalpha, option))
        if edits(_spelling(key), _spelling(option)) <= letters // LETTERS_PER_EDIT and not _extends(key, option):
            return option
    return None


def edits(a: str, b: str) -> int:
    """How many characters to insert, delete, replace or swap with their neighbour to turn one word into the other."""
    before: list[int] = []
    last = list(range(len(b) + 1))  # distances of the prefixes of b from one of a
    for i, x in enumerate(a):
        row = [i + 1]
        for j, y in enumerate(b):
            row.append(min(last[j] + (x != y), last[j + 1] + 1, row[j] + 1))
            if i and j and (x, a[i - 1]) == (b[j - 1], y):
                row[-1] = min(row[-1], before[j - 1] + 1)
        before, last = last, row
    return last[-1]


def _spelling(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _extends(key: str, option: str) -> bool:
    """Whether the key consists of the option's words and others."""
    words = [word for word in key.lower().split("_") if word]
    return set(option.split("_")) < set(words)
