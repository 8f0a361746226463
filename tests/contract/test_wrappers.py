"""Optimizers that wrap ours: SAM, Lookahead, TRAC and ScheduleFree of pytorch_optimizer, and others of their kind.

Each must do what its algorithm, written down here in plain PyTorch around our bare optimizer, does; and resume.
"""

import io
import math

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from efcp import LowRankMFAC, SparseMFAC, memory_report
from tests.contract.optimizers import Regression, small

STEPS = 8


# ---- algorithms in plain PyTorch: a problem with a bare optimizer goes one step


class PlainSAM:
    """The gradient at θ + ρ g/‖g‖ is that of the step."""

    def __init__(self, problem):
        self.problem = problem

    @torch.no_grad()
    def step(self):
        params = self.problem.params
        norm = torch.cat([p.grad.reshape(-1) for p in params]).norm()
        before = [p.clone() for p in params]
        for p in params:
            p += 0.05 * p.grad / norm
        with torch.enable_grad():
            self.problem.backward()
        for p, old in zip(params, before, strict=True):
            p.copy_(old)
        self.problem.optimizer.step()


class PlainLookahead:
    """Every k steps slow ← slow + α (θ − slow), θ ← slow."""

    def __init__(self, problem):
        self.problem, self.count = problem, 0
        self.slow = [p.detach().clone() for p in problem.params]

    @torch.no_grad()
    def step(self):
        self.problem.optimizer.step()
        self.count += 1
        if self.count % 3 == 0:
            for p, slow in zip(self.problem.params, self.slow, strict=True):
                slow += 0.4 * (p - slow)
                p.copy_(slow)


class PlainTRAC:
    """θ ← θ₀ + s δ for the sum δ of all updates, with the scale s from how gradients lie to δ."""

    def __init__(self, problem):
        self.problem, self.scale = problem, 0.0
        self.start = [p.detach().clone() for p in problem.params]
        self.betas = torch.tensor([0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999])
        self.variance, self.sigma = torch.zeros(6), torch.full((6,), 1e-8)

    @torch.no_grad()
    def step(self):
        params = self.problem.params
        deltas = [(p - p0) / (self.scale + 1e-8) for p, p0 in zip(params, self.start, strict=True)]
        h = sum((d * p.grad).sum() for d, p in zip(deltas, params, strict=True))
        before = [p.clone() for p in params]
        self.problem.optimizer.step()
        self.variance = self.betas**2 * self.variance + h**2
        self.sigma = self.betas * self.sigma - h
        x = self.sigma / ((2 * self.variance).sqrt() + 1e-8)
        self.scale = float((0.05 / erfi(torch.tensor(0.5**0.5)) * erfi(x)).sum())
        for p, p0, old, delta in zip(params, self.start, before, deltas, strict=True):
            p.copy_(p0 + max(self.scale, 0.0) * (delta + p - old))


def erfi(x):
    """2/√π ∫₀ˣ exp(t²) dt, by its series."""
    terms = [x.double() ** (2 * n + 1) / (float(math.factorial(n)) * (2 * n + 1)) for n in range(60)]
    return 2 / math.sqrt(math.pi) * sum(terms).float()


class PlainScheduleFree:
    """Steps are of z, gradients at y = 0.9 x + 0.1 z, and x is the mean of all z."""

    def __init__(self, problem):
        self.problem, self.count = problem, 0
        self.x = [p.detach().clone() for p in problem.params]
        self.z = [x.clone() for x in self.x]

    @torch.no_grad()
    def step(self):
        self.count += 1
        for p, z in zip(self.problem.params, self.z, strict=True):
            p.copy_(z)
        self.problem.optimizer.step()
        for p, x, z in zip(self.problem.params, self.x, self.z, strict=True):
            z.copy_(p)
            x += (z - x) / self.count
            p.copy_(0.9 * x + 0.1 * z)


PLAIN = {"SAM": PlainSAM, "Lookahead": PlainLookahead, "TRAC": PlainTRAC, "ScheduleFree": PlainScheduleFree}


# ---- wrappers


class Wrapped:
    """A problem with a wrapped optimizer."""

    def __init__(self, wrapper, cls, **kind):
        po = pytest.importorskip("pytorch_optimizer")
        self.wrapper, self.problem = wrapper, Regression(cls, small(cls), **kind)
        bare = self.problem.optimizer
        if wrapper == "SAM":
            self.outer = po.SAM(self.problem.model.parameters(), cls, rho=0.05, **small(cls))
            self.problem.optimizer = self.outer.base_optimizer
        elif wrapper == "Lookahead":
            self.outer = po.Lookahead(bare, k=3, alpha=0.4)
        elif wrapper == "TRAC":
            self.outer = po.TRAC(bare, s_prev=0.05)
        else:
            self.outer = po.ScheduleFreeWrapper(bare, momentum=0.9)
            self.outer.train()

    def step(self, times=1):
        for _ in range(times):
            self.problem.backward()
            self.outer.step(*[self.problem.backward] if self.wrapper == "SAM" else [])

    def saved(self):
        """What a file with the state holds; of SAM, whose own loading casts the state, that of its base."""
        file = io.BytesIO()
        torch.save((self.problem.optimizer if self.wrapper == "SAM" else self.outer).state_dict(), file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, saved):
        if self.wrapper == "SAM":
            base = self.outer.base_optimizer
            base.load_state_dict(saved)
            self.outer.param_groups, self.outer.state = base.param_groups, base.state
        else:
            self.outer.load_state_dict(saved)


@pytest.fixture(params=PLAIN)
def wrapper(request):
    return request.param


def test_wrapper_does_what_its_algorithm_does(wrapper, cls):
    wrapped, plain = Wrapped(wrapper, cls), Regression(cls, small(cls))
    schedulers = [StepLR(wrapped.outer, 5), StepLR(plain.optimizer, 5)]
    algorithm, first = PLAIN[wrapper](plain), plain.error()
    for _ in range(STEPS):
        wrapped.step()
        plain.backward()
        algorithm.step()
        for scheduler in schedulers:
            scheduler.step()
    torch.testing.assert_close(wrapped.problem.flat(), plain.flat(), rtol=1e-4, atol=1e-5)
    assert wrapped.problem.error() < first


def test_wrapper_resumes_bit_for_bit(wrapper, cls):
    wrapped, other = Wrapped(wrapper, cls), Wrapped(wrapper, cls, seed=1)
    wrapped.step(STEPS)
    other.step(2)
    other.problem.model.load_state_dict(wrapped.problem.model.state_dict())
    other.problem.x, other.problem.y = wrapped.problem.x, wrapped.problem.y
    other.load(wrapped.saved())
    wrapped.step(5)
    other.step(5)
    assert torch.equal(wrapped.problem.flat(), other.problem.flat())


@pytest.mark.parametrize("name", ["Lookahead", "TRAC", "ScheduleFree"])
def test_wrapper_passes_a_closure_on(name, cls):
    """SAM, above, has one in any case."""
    plain, closed = Wrapped(name, cls), Wrapped(name, cls)
    plain.step(4)
    for _ in range(4):
        assert closed.outer.step(closed.problem.backward) is not None
    assert torch.equal(plain.problem.flat(), closed.problem.flat())


def test_memory_report_counts_what_a_wrapper_keeps(cls):
    """TRAC keeps the first parameters, and 19 numbers, under a name of its own."""
    wrapped = Wrapped("TRAC", cls)
    wrapped.step()
    bare = Regression(cls, small(cls))
    bare.step()
    report, before = memory_report(wrapped.problem.optimizer), memory_report(bare.optimizer)
    kept = 4 * (bare.flat().numel() + 6 + 1 + 6 + 6)
    assert report.tensors == before.tensors | {"trac": kept}
    assert f"{kept:,}" in str(report)


def test_state_that_a_wrapper_has_cast_is_refused(cls):
    """`torch.optim.Optimizer.load_state_dict`, called for the wrapper, knows nothing of our dtypes."""
    wrapped, other = Wrapped("SAM", cls), Wrapped("SAM", cls)
    wrapped.step(6)
    other.outer.load_state_dict(wrapped.outer.state_dict())
    before = other.problem.flat()
    other.problem.backward()
    with pytest.raises(ValueError, match=r"optimizer.state: the dtype of \w+ is torch.float32 in the state, but"):
        other.problem.optimizer.step()
    assert torch.equal(other.problem.flat(), before)


def test_wrapper_that_replaces_data(cls, options):
    plain, wrapped = Regression(cls, options), Regression(cls, options)
    for _ in range(5):
        plain.step()
        for p in wrapped.params:
            p.data = p.data.clone()
        wrapped.step()
        for p in wrapped.params:
            p.data = p.data.clone()
    assert torch.equal(plain.flat(), wrapped.flat())


# ---- what wrappers keep in the optimizer's own state


def test_entries_of_wrappers_in_the_state_are_loaded_as_they_are(cls, options):
    """Before the first step as after it, whatever their dtype; tensors in containers too."""
    for steps in (0, 4):
        problem, other = (Regression(cls, options, dtype=torch.bfloat16) for _ in range(2))
        problem.step(steps)
        for number, p in enumerate(problem.params):
            slow = p.detach().float() + 1e-4
            problem.optimizer.state[p] |= {"slow": slow, "past": [(slow * 2, number)], "note": "mine"}
        problem.optimizer.state["wrapper"] = {"scale": torch.tensor(0.1, dtype=torch.float64), "count": 3}
        saved = problem.optimizer.state_dict()
        other.model.load_state_dict(problem.model.state_dict())
        other.optimizer.load_state_dict(saved)
        for number, (p, q) in enumerate(zip(problem.params, other.params, strict=True)):
            own, loaded = problem.optimizer.state[p], other.optimizer.state[q]
            assert own.keys() == loaded.keys()
            assert loaded["slow"].dtype == torch.float32
            assert loaded["slow"] is not own["slow"]
            assert torch.equal(loaded["slow"], own["slow"])
            [(past, count)] = loaded["past"]
            assert past is not own["past"][0][0]
            assert torch.equal(past, 2 * own["slow"])
            assert (count, loaded["note"]) == (number, "mine")
        assert other.optimizer.state["wrapper"] == problem.optimizer.state["wrapper"]
        problem.step(3)
        other.step(3)
        assert torch.equal(problem.flat(), other.flat())


@pytest.mark.parametrize("key", [4, 99])
def test_state_of_a_parameter_that_is_not_there_is_refused(key):
    problem = Regression(SparseMFAC, small(SparseMFAC))
    problem.step()
    saved = problem.optimizer.state_dict()
    saved["state"][key] = {"values": torch.zeros(3)}
    with pytest.raises(ValueError, match="state of 1 parameters that are in no param group"):
        problem.optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda states: states[0].update(rows=states[0].pop("left")), "parameter 0: the state has no left"),
        (lambda states: states[1].pop("rows"), "parameter 1: the state has no rows"),
        (lambda states: states[1].update(gram=states[0]["gram"]), "parameter 1: the state has no .*inverse_root"),
    ],
    ids=["another kind of row", "lost", "two Gram matrices"],
)
def test_names_of_ours_are_no_wrapper_s(change, message):
    problem = Regression(LowRankMFAC, small(LowRankMFAC))
    problem.step()
    saved = problem.optimizer.state_dict()
    change(saved["state"])
    with pytest.raises(ValueError, match=message):
        problem.optimizer.load_state_dict(saved)
