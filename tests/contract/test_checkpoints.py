"""States of earlier versions load and go on; later ones, and parameters under other names, are noticed."""

import copy
import inspect
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import efcp
from efcp import EFCP, DenseMFAC, MicroAdam, SparseMFAC
from efcp.checkpoint import COUNTERS, VERSION
from efcp.checks import plain
from tests.contract.optimizers import CLASSES, Regression, assert_same, small
from tests.contract.states.write import go_on, with_dtypes
from tests.efcp.problems import window_rows

STATES = Path(__file__).parent / "states"
OPTIONS = ("lr", "momentum", "beta1", "weight_decay", "update_rms", "max_update_norm", "maximize")
OTHER = {
    "lr": 0.5,
    "momentum": 0.7,
    "beta1": 0.3,
    "weight_decay": 0.2,
    "max_update_norm": 3.0,
    "update_rms": 0.3,
    "direction": "average",
    "momentum_dtype": "float64",
    "relative": True,
    "adamw": True,
    "maximize": True,
    "eps": 0.7,
    "betas": [0.7, 0.8],
    "correction": "step",
    "beta2": 0.7,
    "damping": 0.7,
    "density": 0.7,
    "block_size": 7,
    "rank": 1,
    "power_iterations": 3,
    "value_dtype": "float32",
    "error_dtype": "float64",
    "error_feedback": False,
    "refresh_every": 3,
}  # than the defaults


# ---- files

SINCE_VERSION_2 = ("MFACW", "KroneckerW", "MicroAdam")
FILES = [
    (version, name)
    for version in range(VERSION + 1)
    for name in sorted({cls.__name__ for cls in CLASSES} | set(SINCE_VERSION_2))
    if version >= 2 or name not in SINCE_VERSION_2
]


def test_there_are_states_of_all_versions_and_optimizers():
    """Where `VERSION` has grown, run states/write.py."""
    found = {str(path.relative_to(STATES)) for path in STATES.rglob("*.pt")}
    assert found == {f"v{version}/{name}.pt" for version, name in FILES}


@pytest.mark.parametrize(("version", "name"), FILES)
def test_state_of_an_earlier_version_loads_and_goes_on(version, name):
    """Up to the rounding of float32, by which steps of other releases and processors may differ.

    Version 0 of GGT added 4e-13 of the trace of the Gram matrix to its eigenvalues, whatever the parameters' dtype;
    now it is 6e-8 for float32. The eigenvalues here are a tenth of the trace, hence weights differ by 1e-6 of
    themselves at most, and parameters, which move by 0.03, by less than their last digit.
    """
    path = STATES / f"v{version}" / f"{name}.pt"
    assert path.stat().st_size < 30_000
    file = torch.load(path, weights_only=True)
    params = [nn.Parameter(value) for value in file["parameters"]]
    optimizer = getattr(efcp, name)(params, **with_dtypes(file["options"]))
    optimizer.load_state_dict(file["optimizer"])
    go_on(optimizer, params, file["gradients"])
    for p, expected in zip(params, file["expected"], strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-6)
    if optimizer.preconditioner.uses_gram:
        rows = torch.cat([window_rows(optimizer, p) for p in params], dim=1)
        torch.testing.assert_close(optimizer.shared["gram"], rows @ rows.t(), rtol=1e-9, atol=1e-9)
    saved = optimizer.state_dict()
    assert saved["state"][0]["version"] == VERSION
    assert type(optimizer)(params, **with_dtypes(file["options"])).load_state_dict(saved) is None


@pytest.mark.parametrize(
    "what", ["momentum", "average", "error", "error_codes", "basis", "indices", "eigenvectors", "metrics"]
)
def test_files_would_show_that_a_part_of_the_state_was_lost(what):
    """Each is in a file, and the parameters that follow depend on it."""
    losses = []
    for version, name in FILES:
        if version < VERSION:
            continue
        file = torch.load(STATES / f"v{VERSION}" / f"{name}.pt", weights_only=True)
        states = file["optimizer"]["state"]
        if what not in states[0]:
            continue
        for state in states.values():
            if what in state:
                state[what].copy_(state[what].flip(0) if what == "eigenvectors" else state[what] * 0)
        if what == "indices":
            states[0][what].copy_(torch.arange(states[0][what].shape[-1]))
            states = file["optimizer"]["state"] = {0: states[0]}
        params = [nn.Parameter(value) for value in file["parameters"]]
        optimizer = getattr(efcp, name)(params, **with_dtypes(file["options"]))
        optimizer.load_state_dict(file["optimizer"])
        go_on(optimizer, params, file["gradients"])
        losses.append(max((p - q).abs().max().item() for p, q in zip(params, file["expected"], strict=True)))
    assert losses
    assert min(losses) > 1e-5


# ---- options


def options_of(cls):
    optimizer = cls([nn.Parameter(torch.zeros(1))])
    return [name for name in optimizer.param_groups[0] if name not in ("params", "window")]


def default(cls, name):
    arguments = inspect.signature(cls).parameters
    if name == "relative":  # an argument of another name
        return False
    value = arguments[name].default if name in arguments else inspect.signature(EFCP).parameters[name].default
    return plain(value)


LACKING = [(cls, name) for cls in CLASSES for name in options_of(cls) if name != "lr"]  # every state has lr
LACKING.remove((MicroAdam, "error_dtype"))  # there was none without it, and its default is not that of TopK
LACKING = [(cls, name) for cls, name in LACKING if name != "aligned"]  # which stays that of the optimizer


@pytest.mark.parametrize(("cls", "name"), LACKING, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_state_that_lacks_an_option_has_its_default(cls, name):
    """As one that was saved before there was this option."""
    options = small(cls)
    options.pop(name, None)
    source, target, other = (Regression(cls, options | {"lr": options.get("lr", 1e-3)}) for _ in range(3))
    source.step(6)
    saved = source.optimizer.state_dict()
    del saved["param_groups"][0][name]
    target.model.load_state_dict(source.model.state_dict())
    identifying = "betas" if cls is MicroAdam else "eps"
    if name in ("damping", identifying, "density", "rank"):  # by which kinds of optimizer are known
        with pytest.raises(ValueError, match=f"the state has no {name}; it was saved by another kind of optimizer"):
            target.optimizer.load_state_dict(saved)
        return
    free = name in (*OPTIONS, "beta2", "eps", "correction") or (name == "relative" and "GGT" in cls.__name__)
    assert OTHER[name] != default(cls, name)
    (target if free else other).optimizer.param_groups[0][name] = OTHER[name]
    target.optimizer.load_state_dict(saved)
    assert target.optimizer.param_groups[0][name] == default(cls, name)
    source.optimizer.param_groups[0][name] = default(cls, name)
    for problem in (source, target):
        problem.step(2)
    assert_same(source, target)
    if not free:
        with pytest.raises(ValueError, match=f"{name} is .* in the state, but {OTHER[name]!r} in the optimizer"):
            other.optimizer.load_state_dict(saved)


# ---- counters and versions


FORMS = {
    "int": int,
    "float": float,
    "float32": lambda t: t.float(),
    "bfloat16": lambda t: t.bfloat16(),
    "int32": lambda t: t.int(),
}


@pytest.mark.parametrize("form", FORMS)
def test_counters_load_in_any_form(cls, options, form):
    problem, other = Regression(cls, options), Regression(cls, options)
    problem.step(6)
    saved = copy.deepcopy(problem.optimizer.state_dict())
    for name in COUNTERS:
        if name in saved["state"][0]:
            saved["state"][0][name] = FORMS[form](saved["state"][0][name])
    other.model.load_state_dict(problem.model.state_dict())
    other.optimizer.load_state_dict(saved)
    assert_same(problem, other)
    problem.step(3)
    other.step(3)
    assert_same(problem, other)


@pytest.mark.parametrize("value", [2.5, float("nan"), float("inf"), torch.tensor(torch.nan), "6", None], ids=repr)
@pytest.mark.parametrize("name", COUNTERS)
def test_counters_that_count_nothing_are_refused(name, value):
    problem = Regression(DenseMFAC, small(DenseMFAC))
    problem.step(6)
    saved = copy.deepcopy(problem.optimizer.state_dict())
    saved["state"][0][name] = value
    with pytest.raises(ValueError, match=rf"the (d?type|dtype) of {name} is"):
        problem.optimizer.load_state_dict(saved)


def test_version_is_in_the_state(cls, options):
    problem = Regression(cls, options)
    problem.step()
    assert problem.optimizer.state_dict()["state"][0]["version"] == VERSION


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (VERSION + 1, f"saved by a later release: its version is {VERSION + 1}, here it is {VERSION}"),
        ("1", "version must be an integer ≥ 0, got '1'"),
        (-1, "version must be an integer ≥ 0, got -1"),
    ],
)
def test_state_of_another_version_is_refused(cls, options, version, message):
    """Whatever else has changed since, and before anything is changed here."""
    problem, other, untouched = (Regression(cls, options) for _ in range(3))
    problem.step(6)
    saved = copy.deepcopy(problem.optimizer.state_dict())
    saved["state"][0] = {"version": version, "everything": torch.zeros(3)}
    saved["param_groups"][0] = {"params": saved["param_groups"][0]["params"], "windows": 3}
    for twin in (other, untouched):
        twin.step(2)
    with pytest.raises(ValueError, match=message):
        other.optimizer.load_state_dict(saved)
    assert_same(other, untouched)


# ---- names


def two_groups(names):
    """An optimizer of two groups of two parameters, all alike but for their names."""
    params = [(name, nn.Parameter(torch.ones(3))) for name in names]
    return SparseMFAC([{"params": params[:2]}, {"params": params[2:]}], **small(SparseMFAC))


def warnings_of_loading(saved, loading):
    """The warnings where a state is loaded, and the optimizer that has loaded it."""
    source, target = two_groups(saved), two_groups(loading)
    for number, p in enumerate(p for group in source.param_groups for p in group["params"]):
        p.grad = torch.full((3,), number + 1.0)
    source.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        target.load_state_dict(source.state_dict())
    for group, other in zip(source.param_groups, target.param_groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            assert torch.equal(source.state[p]["values"], target.state[q]["values"])
    assert [group["param_names"] for group in target.param_groups] == [loading[:2], loading[2:]]
    return caught


@pytest.mark.parametrize(
    ("loading", "pairs"),
    [
        (["b", "a", "c", "d"], ["'a' goes to 'b'", "that of 'b' goes to 'a'"]),
        (["a", "c", "b", "d"], ["'b' goes to 'c'", "that of 'c' goes to 'b'"]),
        (["w", "x", "y", "z"], ["'a' goes to 'w'", "'b' goes to 'x'", "'c' goes to 'y' and so on, 4 in all"]),
    ],
    ids=["within a group", "across groups", "all"],
)
def test_states_that_go_to_parameters_of_other_names_give_one_warning(loading, pairs):
    """In the line that loads them; they are matched by their order all the same."""
    [caught] = warnings_of_loading(["a", "b", "c", "d"], loading)
    assert "parameters are matched by their order" in str(caught.message)
    assert all(pair in str(caught.message) for pair in pairs)
    assert caught.filename == __file__


def test_states_that_go_to_parameters_of_their_names_give_no_warning():
    assert warnings_of_loading(["a", "b", "c", "d"], ["a", "b", "c", "d"]) == []


def test_states_without_names_give_no_warning():
    problem, other = (Regression(SparseMFAC, small(SparseMFAC), named=named) for named in (False, True))
    problem.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.optimizer.load_state_dict(problem.optimizer.state_dict())
        problem.optimizer.load_state_dict(other.optimizer.state_dict())
