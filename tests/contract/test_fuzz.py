"""Any sequence of what users do leaves state that is finite, and a Gram matrix that is that of the window.

Where users edit groups, parameters or states, it is that of the window again with the next step.
"""

import copy
import io
from collections import defaultdict

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from efcp import DenseGGT, LowRankMFAC, MicroAdam, SparseGGT, SparseMFAC, estimate_memory, memory_report
from tests.contract.optimizers import momentum_of, small
from tests.efcp.problems import window_rows

SHAPES = [(3, 5), (), (17,), (4, 2, 3)]
KINDS = st.sampled_from(["normal", "normal", "none", "zero", "nan", "inf", "huge", "large"])


class Training(RuleBasedStateMachine):
    """An optimizer in the hands of a careless user; what it should have counted is counted beside it."""

    @initialize(cls=st.sampled_from([SparseMFAC, DenseGGT, LowRankMFAC, SparseGGT, MicroAdam]), seed=st.integers(0, 99))
    def start(self, cls, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.options = small(cls) | momentum_of(cls) | {"window": 3, "weight_decay": 0.1}
        self.params = [self.parameter(shape) for shape in SHAPES[:2]]
        self.optimizer = cls(self.params, **self.options)
        self.steps = self.skipped = 0
        self.edited = False

    def parameter(self, shape):
        return torch.nn.Parameter(torch.randn(shape, generator=self.generator))

    def step(self, kinds):
        before = [p.detach().clone() for p in self.params]
        for p, kind in zip(self.params, kinds * 4, strict=False):
            p.grad = None if kind == "none" else torch.randn(p.shape, generator=self.generator)
            if kind in ("zero", "large"):
                p.grad.mul_({"zero": 0, "large": 1e3}[kind])
            elif kind in ("nan", "inf", "huge"):
                p.grad.view(-1)[-1] = {"nan": torch.nan, "inf": -torch.inf, "huge": 1e30}[kind]
        self.optimizer.step()
        given = [p for p in self.params if p.grad is not None]
        bad = any(p.grad.square().sum().isfinite().logical_not() for p in given)
        self.steps += bool(given)
        self.skipped += bad
        self.edited &= not given
        assert all("numel" in self.optimizer.state[p] for p in given)
        for p, value in zip(self.params, before, strict=True):
            assert torch.equal(p, value) or not (bad or p.grad is None)

    @rule(kinds=st.lists(KINDS, min_size=1, max_size=4), times=st.integers(1, 5))
    def take_steps(self, kinds, times):
        for _ in range(times):
            self.step(kinds * 8)
            self.gram_is_that_of_the_window()

    @precondition(lambda self: len(self.optimizer.param_groups) < 4)
    @rule(shape=st.sampled_from(SHAPES), lr=st.floats(0, 0.1), in_front=st.booleans())
    def add_group(self, shape, lr, in_front):
        p = self.parameter(shape)
        shared = {name: self.options[name] for name in ("damping", "eps") if name in self.options}
        self.optimizer.add_param_group({"params": [p], "lr": lr, **shared})
        if in_front:
            self.optimizer.param_groups.insert(0, self.optimizer.param_groups.pop())
        self.list_params()

    @precondition(lambda self: len(self.params) > 1)
    @rule(position=st.integers(0, 3), keep_state=st.booleans())
    def remove_parameter(self, position, keep_state):
        group, p = list(self.members())[position % len(self.params)]
        position = next(i for i, other in enumerate(group["params"]) if other is p)
        del group["params"][position]
        if not group["params"]:
            self.optimizer.param_groups = [other for other in self.optimizer.param_groups if other is not group]
        if not keep_state:
            self.optimizer.state.pop(p, None)
        self.list_params()
        self.edited = True

    @rule()
    def reverse_groups(self):
        self.optimizer.param_groups.reverse()
        self.list_params()

    @rule(position=st.integers(0, 3), whole=st.booleans())
    def delete_state(self, position, whole):
        p = self.params[position % len(self.params)]
        if whole:
            self.optimizer.state.pop(p, None)
        else:
            self.optimizer.state[p].clear()
        self.edited = True

    @rule()
    def delete_all_states(self):
        self.optimizer.state = defaultdict(dict)
        self.edited = True

    @rule(position=st.integers(0, 3), factor=st.sampled_from([0.0, 0.5]), in_place=st.booleans())
    def shrink_state(self, position, factor, in_place):
        for p in self.params[position % len(self.params) :]:
            for name, value in self.optimizer.state.get(p, {}).items():
                if name in ("values", "rows", "left", "right", "error", "momentum"):
                    self.optimizer.state[p][name] = value.mul_(factor) if in_place else value * factor
        self.edited = True

    @rule()
    def clone_states(self):
        for state in self.optimizer.state.values():
            state.update({name: value.clone() for name, value in state.items() if torch.is_tensor(value)})

    def list_params(self):
        self.params = [p for _, p in self.members()]

    @rule(fresh=st.booleans())
    def save_and_load(self, fresh):
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        if fresh:
            groups = [{**group, "params": list(group["params"])} for group in self.optimizer.param_groups]
            self.optimizer = type(self.optimizer)(groups, **self.options)
        self.optimizer.load_state_dict(torch.load(file, weights_only=True))

    @rule()
    def copy(self):
        self.params, self.optimizer = copy.deepcopy((self.params, self.optimizer))

    @rule(group=st.integers(0, 3), lr=st.floats(0, 0.1), tensor=st.booleans())
    def set_lr(self, group, lr, tensor):
        groups = self.optimizer.param_groups
        groups[group % len(groups)]["lr"] = torch.tensor(lr) if tensor else lr

    @rule(group=st.integers(0, 3), momentum=st.sampled_from([0.0, 0.5, 0.9]))
    def set_momentum(self, group, momentum):
        groups = self.optimizer.param_groups
        groups[group % len(groups)]["momentum"] = momentum

    @rule(factor=st.sampled_from([0.1, 0.5, 2.0]))
    def set_damping(self, factor):
        name = "damping" if "damping" in self.options else "eps"
        value = min(max(self.optimizer.param_groups[0][name] * factor, 1e-3), 10.0)
        self.options[name] = value
        for group in self.optimizer.param_groups:
            group[name] = value

    @invariant()
    def counts_are_right(self):
        assert self.optimizer.skipped_steps == self.skipped
        assert int(self.optimizer.shared.get("step", 0)) == self.steps

    @invariant()
    def all_is_finite(self):
        assert all(p.isfinite().all() for p in self.params)
        for state in self.optimizer.state.values():
            assert all(value.isfinite().all() for value in state.values() if torch.is_tensor(value))

    @invariant()
    def gram_is_that_of_the_window(self):
        if not self.steps or self.edited or not self.optimizer.preconditioner.uses_gram:
            return
        windowed = [p for p in self.params if "numel" in self.optimizer.state.get(p, {})]
        rows = torch.cat([window_rows(self.optimizer, p) for p in windowed], dim=1)
        expected = rows @ rows.t()
        gram = self.optimizer.shared["gram"]
        scale = expected.diagonal().sqrt()
        assert ((gram - expected).abs() <= 1e-6 * torch.outer(scale, scale) + 1e-30).all()

    @invariant()
    def memory_is_as_estimated(self):
        if self.edited or any("numel" not in self.optimizer.state.get(p, {}) for p in self.params):
            return
        if len(self.optimizer.state) > len(self.params):
            return  # states of parameters that have left
        if any(group["momentum"] == 0 and "momentum" in self.optimizer.state[p] for group, p in self.members()):
            return  # momentum that was switched off keeps its tensor
        if any(group["momentum"] > 0 and "momentum" not in self.optimizer.state[p] for group, p in self.members()):
            return  # switched on, with no step yet
        groups = [{**group, "params": list(group["params"])} for group in self.optimizer.param_groups]
        estimated = estimate_memory(groups, type(self.optimizer), **self.options)
        assert estimated == memory_report(self.optimizer)

    def members(self):
        return ((group, p) for group in self.optimizer.param_groups for p in group["params"])


TestTraining = Training.TestCase
TestTraining.settings = settings(
    max_examples=60, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
