"""What all parameters share belongs to the windows that are there, whatever is done to groups, parameters and states.

After each edit, and after a step that broke off anywhere, the next step has S = GGᵀ of the rows that are there, and
weights that are f(S) e_t; and so has the next step of what was saved in between.
"""

import copy
import gc
import inspect
import io
import pickle
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import nn

import efcp
from efcp import GGT, DenseMFAC, SparseMFAC
from efcp.gram import Gram
from efcp.options import agreed_preconditioner
from tests.contract.optimizers import SETTINGS, assert_same, momentum_of, small
from tests.efcp.problems import newest_slot, window_rows

WINDOWED = ("values", "rows", "left", "right", "error")


class Task:
    """Three groups of parameters, some of the same shape, a loss of all of them, and an optimizer that goes on."""

    SHAPES = (((5, 7), (7,)), ((7,), (5, 7)), ((3,), ()))

    def __init__(self, cls, **options):
        generator = torch.Generator().manual_seed(0)
        self.generator, self.frozen = torch.Generator().manual_seed(1), []
        groups = [[nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes] for shapes in self.SHAPES]
        own = momentum_of(cls)
        if cls.__name__ in ("DenseGGT", "LowRankGGT"):
            own |= {"beta1": 0.5, "beta2": 0.9, "refresh_every": 2}
        self.optimizer = cls([{"params": group} for group in groups], **small(cls) | own | options)

    @property
    def params(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def set_gradients(self):
        """Of ½‖θ − 1‖², with noise of each step."""
        noise = torch.randn(64, generator=self.generator)
        for p in self.params:
            if any(p is other for other in self.frozen):
                continue
            p.grad = (p.detach() - 1) + 0.3 * noise[: p.numel()].view(p.shape)

    def step(self, times=1):
        for _ in range(times):
            self.set_gradients()
            self.optimizer.step()

    def flat(self):
        return torch.cat([p.detach().reshape(-1) for p in self.params])

    def error(self):
        return (self.flat() - 1).square().mean().item()

    def fresh(self):
        """The same parameters and groups, and an optimizer that has not stepped."""
        other = copy.copy(self)
        other.generator = torch.Generator()
        other.generator.set_state(self.generator.get_state())
        twins = {p: nn.Parameter(p.detach().clone()) for p in self.params}
        other.frozen = [twins[p] for p in self.frozen if p in twins]
        groups = [{**group, "params": [twins[p] for p in group["params"]]} for group in self.optimizer.param_groups]
        other.optimizer = type(self.optimizer)(groups, window=groups[0]["window"])
        return other

    def loaded(self):
        """The same, with the state loaded from a file."""
        other, file = self.fresh(), io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        other.optimizer.load_state_dict(torch.load(file, weights_only=True))
        return other

    def copied(self):
        return copy.deepcopy(self)

    def pickled(self):
        other = copy.copy(self)
        other.generator = torch.Generator()
        other.generator.set_state(self.generator.get_state())
        other.optimizer, other.frozen = pickle.loads(pickle.dumps((self.optimizer, self.frozen)))
        return other


def assert_follows(optimizer):
    """S is GGᵀ, and the weights of the last step are those of S; or of the number of steps, where S is not used."""
    if not optimizer.preconditioner.uses_gram:
        assert not optimizer.shared["pending"]
        assert not optimizer.shared["gram"].any()
        slot = torch.tensor([newest_slot(optimizer)])
        expected = agreed_preconditioner(optimizer.param_groups, optimizer.preconditioner)
        assert torch.equal(optimizer.shared["weights"], expected.weights(Gram(optimizer.shared), slot))
        return
    params = [p for group in optimizer.param_groups for p in group["params"]]
    rows = torch.cat([window_rows(optimizer, p) for p in params if "numel" in optimizer.state.get(p, {})], dim=1)
    expected, shared = rows @ rows.t(), optimizer.shared
    lengths = expected.diagonal().sqrt()
    assert not shared["pending"]
    assert ((shared["gram"] - expected).abs() <= 1e-9 * torch.outer(lengths, lengths)).all()
    assert "imprecise_steps" not in shared or shared["imprecise_steps"] == 0

    S, slot, group = shared["gram"], newest_slot(optimizer), optimizer.param_groups[0]
    if "damping" in group:
        ridge = len(S) * group["damping"] * torch.eye(len(S), dtype=S.dtype)
        weights = len(S) * torch.linalg.inv(ridge + S)[slot]
    else:
        definition = GGT(eps=group["eps"], beta2=group["beta2"])
        weights = definition.weights(Gram({"gram": S}, torch.finfo(torch.float32).eps), torch.tensor([slot]))
    torch.testing.assert_close(shared["weights"], weights, rtol=1e-6, atol=1e-8 * weights.abs().max().item())


# ---- edits


def group_in_front(task):
    p = nn.Parameter(torch.zeros(6, 5))
    shared = ("eps", "beta2", "refresh_every", "damping", "betas")
    own = {name: value for name, value in task.optimizer.param_groups[0].items() if name in shared}
    task.optimizer.add_param_group({"params": [p], **own})
    task.optimizer.param_groups.insert(0, task.optimizer.param_groups.pop())


def first_group_gone(task):
    del task.optimizer.param_groups[0]


def last_group_gone(task):
    del task.optimizer.param_groups[-1]


def first_parameter_gone(task):
    del task.optimizer.param_groups[0]["params"][0]


def first_parameter_and_its_state_gone(task):
    task.optimizer.state.pop(task.optimizer.param_groups[0]["params"].pop(0), None)


def first_state_cleared(task):
    task.optimizer.state[task.params[0]].clear()


def second_state_deleted(task):
    del task.optimizer.state[task.params[1]]


def all_states_deleted(task):
    for p in list(task.optimizer.state):
        del task.optimizer.state[p]


def all_states_replaced_by_none(task):
    task.optimizer.state = defaultdict(dict)


def groups_reversed(task):
    task.optimizer.param_groups.reverse()


def parameters_swapped(task):
    first, second = (group["params"] for group in task.optimizer.param_groups[:2])
    first[0], second[0] = second[0], first[0]


def states_swapped(task):
    """Of the first and the last of the parameters of 5 × 7, and of those of 7."""
    states, (a, b, c, d) = task.optimizer.state, task.params[:4]
    states[a], states[d] = states[d], states[a]
    states[b], states[c] = states[c], states[b]


def cloned(task, params):
    for p in params:
        state = task.optimizer.state[p]
        for name, value in state.items():
            state[name] = value.clone() if torch.is_tensor(value) else value


def tensors_of_all_cloned(task):
    cloned(task, task.params)


def tensors_of_the_first_two_cloned(task):
    cloned(task, task.params[:2])


def states_moved(task):
    """To new parameters in the place of the old ones, as when a model is wrapped or converted."""
    optimizer = task.optimizer
    for group in optimizer.param_groups:
        for position, p in enumerate(group["params"]):
            new = group["params"][position] = nn.Parameter(p.detach().clone())
            if p in optimizer.state:
                optimizer.state[new] = optimizer.state.pop(p)
            task.frozen = [new if p is other else other for other in task.frozen]


def each_of(task, change, params):
    for p in params:
        state = task.optimizer.state.get(p, {})
        for name in WINDOWED:
            if name in state:
                change(state, name)


def zeroed(state, name):
    state[name].zero_()


def pruned(state, name):
    state[name].mul_(state[name].abs() > state[name].abs().float().median())


def all_zeroed(task):
    each_of(task, zeroed, task.params)


def first_two_zeroed(task):
    each_of(task, zeroed, task.params[:2])


def all_pruned(task):
    each_of(task, pruned, task.params)


def last_pruned(task):
    each_of(task, pruned, task.params[3:])


def all_pruned_in_new_tensors(task):
    """Nothing that was there is left, not even of what is shared."""
    tensors_of_all_cloned(task)
    all_pruned(task)


def one_row_written(task):
    def write(state, name):
        if name in ("values", "rows", "right"):
            state[name].select(1 if name == "values" else 0, 2).fill_(0.25)

    each_of(task, write, task.params[2:3])


NEUTRAL = [
    groups_reversed,
    parameters_swapped,
    tensors_of_all_cloned,
    tensors_of_the_first_two_cloned,
    states_moved,
]
EDITS = [
    *NEUTRAL,
    group_in_front,
    first_group_gone,
    last_group_gone,
    first_parameter_gone,
    first_parameter_and_its_state_gone,
    first_state_cleared,
    second_state_deleted,
    all_states_deleted,
    all_states_replaced_by_none,
    states_swapped,
    all_zeroed,
    first_two_zeroed,
    all_pruned,
    last_pruned,
    all_pruned_in_new_tensors,
    one_row_written,
]
named = {"ids": lambda edit: edit.__name__}


def trained(cls, frozen):
    task = Task(cls)
    if frozen:
        task.frozen = task.params[:1]
    task.step(7)  # the next step is not one at which GGT decomposes anyway
    assert_follows(task.optimizer)
    return task


@pytest.fixture(params=[False, True], ids=["", "first-parameter-has-no-gradient"])
def frozen(request):
    return request.param


@pytest.mark.parametrize("edit", EDITS, **named)
def test_next_steps_follow_the_windows_that_are_there(cls, edit, frozen):
    """Those of the optimizer that was edited, and those of a fresh one that loads its state, bit for bit alike."""
    task = trained(cls, frozen)
    edit(task)
    at_once, before = task.loaded(), task.error()
    for _ in range(6):
        task.step()
        at_once.step()
        assert_follows(task.optimizer)
    assert_same(task, at_once)
    later = task.loaded()
    for other in (task, later):
        other.step(3)
        assert_follows(other.optimizer)
    assert_same(task, later)
    assert task.error() < before


@pytest.mark.parametrize("edit", NEUTRAL, **named)
def test_edit_that_means_nothing_changes_nothing(cls, edit, frozen):
    """But for rounding: inner products are added in another order."""
    task, plain = (trained(cls, frozen) for _ in range(2))
    edit(task)
    task.step(4)
    plain.step(4)
    if edit is groups_reversed:
        task.optimizer.param_groups.reverse()
    if edit is parameters_swapped:
        parameters_swapped(task)
    torch.testing.assert_close(task.flat(), plain.flat(), rtol=1e-5, atol=1e-6)


def test_tensors_that_are_cloned_as_they_are_keep_the_matrix_bit_for_bit(cls):
    """As when states are moved to another device, or loaded by a wrapper."""
    task, plain = (trained(cls, False) for _ in range(2))
    tensors_of_all_cloned(task)
    for other in (task, plain):
        other.step(3)
    assert_same(task, plain)


@pytest.mark.parametrize("through", ["copied", "pickled"])
@pytest.mark.parametrize("edit", [first_parameter_gone, all_pruned, group_in_front, all_states_deleted], **named)
def test_copies_of_an_edited_optimizer_follow_their_windows(cls, edit, through):
    task = trained(cls, False)
    edit(task)
    other = getattr(task, through)()
    for _ in range(3):
        task.step()
        other.step()
        assert_follows(other.optimizer)
    assert_same(task, other)


def test_matrix_beside_windows_that_are_not_its_own_is_not_taken_over(cls):
    """Nothing has been saved since the edit, hence nothing has been noted."""
    task = trained(cls, False)
    all_pruned_in_new_tensors(task)
    task.step()
    assert_follows(task.optimizer)


def test_what_is_shared_is_in_one_state_alone(cls):
    """That of the first parameter that has a window, through edits that change which one that is."""
    task = trained(cls, True)
    for edit in (group_in_front, groups_reversed, first_parameter_gone, first_group_gone):
        edit(task)
        for _ in range(2):
            saved = task.optimizer.state_dict()
            [home] = [key for key, state in saved["state"].items() if "gram" in state]
            assert home == min(key for key, state in saved["state"].items() if "numel" in state)
            for key, state in saved["state"].items():
                assert key == home or state.keys().isdisjoint(task.optimizer.shared)
            task.step()


def test_all_groups_may_leave_and_others_come(cls):
    task = trained(cls, False)
    groups = list(task.optimizer.param_groups)
    task.optimizer.param_groups.clear()
    task.optimizer.step()
    assert task.optimizer.state_dict()["param_groups"] == []
    task.optimizer.param_groups.extend(groups[1:])
    task.step(3)
    assert_follows(task.optimizer)


def test_states_that_somebody_else_has_replaced_are_checked():
    task = trained(DenseMFAC, False)
    all_pruned_in_new_tensors(task)
    task.optimizer.state[task.params[2]]["rows"][1] = torch.nan
    with pytest.raises(ValueError, match=r"param_groups\[1\], parameter 0: rows must be finite"):
        task.step()


# ---- steps that break off


PACKAGE = str(Path(efcp.__file__).parent)


class Stop(BaseException):
    """As KeyboardInterrupt, no Exception."""


class Calls:
    """A profiler that lists the calls that the package, but for its kernels, makes; it can raise `Stop` at one."""

    def __init__(self, stop_at=None):
        self.sites, self.stop_at = [], stop_at

    def __call__(self, frame, event, arg):
        if event not in ("call", "c_call"):
            return
        name = frame.f_code.co_name if event == "call" else arg.__name__
        if name in ("__enter__", "__exit__"):  # else PyTorch's modes would outlast the step
            return
        if event == "call" and frame.f_code.co_flags & inspect.CO_GENERATOR:  # what is raised at their end is lost
            return
        caller = frame.f_back if event == "call" else frame
        if caller is None or not caller.f_code.co_filename.startswith(PACKAGE):
            return
        self.sites.append((caller.f_code, caller.f_lasti))
        if len(self.sites) - 1 == self.stop_at:
            raise Stop

    def step(self, task):
        task.set_gradients()
        gc.disable()  # it would call finalizers anywhere, and the calls of two steps would differ in number
        sys.setprofile(self)
        try:
            task.optimizer.step()
        finally:
            sys.setprofile(None)
            gc.enable()


def places(task):
    """The numbers of the calls of the next step at which to stop: the last one from every other place in the code.

    Earlier calls from there differ by the parameter that they are for. The places left out are those that another class
    with the same compressor, or the same preconditioner, stops at.
    """
    task.copied().step()  # what is compiled or kept for later steps is from here on
    calls = Calls()
    calls.step(task.copied())
    last = {site: number for number, site in enumerate(calls.sites)}
    share = SETTINGS.index(type(task.optimizer)) % 2 == 0
    return sorted(number for (_, instruction), number in last.items() if (instruction // 2) % 2 == share)


@pytest.mark.parametrize("steps", [0, pytest.param(6, marks=pytest.mark.slow)], ids=["the first step", "a later step"])
def test_step_that_breaks_off_anywhere_leaves_a_state_to_go_on_from(cls, steps):
    """In place, and through what was saved in between."""
    start = Task(cls)
    start.step(steps)
    stops = places(start)
    assert len(stops) > 80
    for number, stop in enumerate(stops):
        task = start.copied()
        with pytest.raises(Stop):
            Calls(stop).step(task)
        other = getattr(task, ("loaded", "copied", "pickled")[number % 3])()
        for each in (task, other):
            each.step()
            assert_follows(each.optimizer)
        assert_same(task, other)


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("efcp.windows.sparse.kernels", "compress_"),
        ("efcp.windows.sparse.kernels", "window_dots"),
        ("efcp.windows.sparse.kernels", "window_apply_"),
        ("efcp.preconditioners.mfac.kernels", "mfac_row_step_"),
        ("efcp.optimizer.Origin", "__init__"),
    ],
)
def test_step_whose_part_fails_after_its_work_leaves_a_state_to_go_on_from(where, name, monkeypatch):
    """As when memory runs out in what follows."""
    task = trained(SparseMFAC, False)
    module, _, attribute = where.rpartition(".")
    owner = getattr(sys.modules[module], attribute)
    original = getattr(owner, name)

    def failing(*arguments):
        original(*arguments)
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failing)
        with pytest.raises(MemoryError):
            task.step()
    other = task.loaded()
    for each in (task, other):
        each.step(2)
        assert_follows(each.optimizer)
    assert_same(task, other)
