"""What an optimizer does takes time in proportion to the number of its parameters and groups: lines are counted."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import efcp
from efcp import DenseMFAC, SparseGGT
from tests.contract.optimizers import small

FEW = 25
PACKAGE = str(Path(efcp.__file__).parent)


def optimizer_of(cls, count, grouped):
    params = [nn.Parameter(torch.ones(2)) for _ in range(count)]
    named = [(f"p{number}", p) for number, p in enumerate(params)]
    optimizer = cls([{"params": [pair]} for pair in named] if grouped else named, **small(cls))
    for p in params:
        p.grad = torch.ones(2)
    return optimizer


def stepped(cls, count, grouped, gradient=1.0):
    optimizer = optimizer_of(cls, count, grouped)
    optimizer.step()
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad.fill_(gradient)
    return optimizer


def construct(cls, count, grouped):
    return lambda: optimizer_of(cls, count, grouped)


def step(cls, count, grouped):
    return stepped(cls, count, grouped).step


def first_step(cls, count, grouped):
    return optimizer_of(cls, count, grouped).step


def step_after_all_states_were_replaced(cls, count, grouped):
    optimizer = stepped(cls, count, grouped)
    for state in optimizer.state.values():
        state.update({name: value.clone() for name, value in state.items() if torch.is_tensor(value)})
    return optimizer.step


def step_after_all_states_were_written(cls, count, grouped):
    optimizer = stepped(cls, count, grouped)
    for state in optimizer.state.values():
        state["rows" if "rows" in state else "values"].mul_(0.5)
    return optimizer.step


def steps_with_a_warning_of_all_gradients(cls, count, grouped):
    optimizer = stepped(cls, count, grouped, torch.nan)

    def run():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(10):
                optimizer.step()
        assert f" and {count - 5} others" in str(caught[0].message)

    return run


def state_dict(cls, count, grouped):
    return stepped(cls, count, grouped).state_dict


def state_dict_of_parameters_that_have_left(cls, count, grouped):
    optimizer = stepped(cls, count, grouped)
    for group in optimizer.param_groups[count // 2 :]:
        group["params"].clear()
    return optimizer.state_dict


def load_state_dict(cls, count, grouped):
    saved = stepped(cls, count, grouped).state_dict()
    optimizer = optimizer_of(cls, count, grouped)
    return lambda: optimizer.load_state_dict(saved)


def load_state_dict_with_other_names(cls, count, grouped):
    saved = stepped(cls, count, grouped).state_dict()
    for group in saved["param_groups"]:
        group["param_names"] = [f"other_{name}" for name in group["param_names"]]
    optimizer = optimizer_of(cls, count, grouped)

    def run():
        with pytest.warns(UserWarning, match=f"{count} in all"):
            optimizer.load_state_dict(saved)

    return run


ACTIONS = [
    construct,
    first_step,
    step,
    step_after_all_states_were_replaced,
    step_after_all_states_were_written,
    steps_with_a_warning_of_all_gradients,
    state_dict,
    state_dict_of_parameters_that_have_left,
    load_state_dict,
    load_state_dict_with_other_names,
]


def lines(function):
    """How many lines of the package a function runs, those of each turn of a loop among them."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        inside = frame.f_code.co_filename.startswith(PACKAGE)
        count += inside
        return trace if inside else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "as many groups"])
@pytest.mark.parametrize("cls", [DenseMFAC, SparseGGT])
@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
def test_twice_as_many_parameters_need_twice_the_work_at_most(action, cls, grouped):
    lines(action(cls, FEW, grouped))  # fills caches
    few, many = (lines(action(cls, count, grouped)) for count in (FEW, 2 * FEW))
    assert many <= 2.01 * few
