"""All optimizers, options for a small window, and a small training loop."""

import torch
from torch import nn

import efcp

CLASSES = [
    efcp.SparseMFAC,
    efcp.DenseMFAC,
    efcp.LowRankMFAC,
    efcp.SparseGGT,
    efcp.DenseGGT,
    efcp.LowRankGGT,
    efcp.MicroAdam,
]


class SparseMFAC8(efcp.SparseMFAC):
    """With the error in 8 bits."""

    def __init__(self, params, lr=1e-3, *, error_dtype=torch.int8, **options):
        super().__init__(params, lr, error_dtype=error_dtype, **options)


class SparseGGT4(efcp.SparseGGT):
    """With the error in 4 bits."""

    def __init__(self, params, lr=1e-3, *, error_dtype=torch.int4, **options):
        super().__init__(params, lr, error_dtype=error_dtype, **options)


class DenseAdam(efcp.EFCP):
    """Adam's moments over a window of whole gradients."""

    def __init__(self, params, lr=1e-3, *, eps=1e-8, **options):
        super().__init__(params, lr, efcp.Identity(), efcp.AdamStats(eps=eps), **options)


SETTINGS = [*CLASSES, SparseMFAC8, SparseGGT4, DenseAdam]


def is_sparse(cls):
    return "Sparse" in cls.__name__ or cls is efcp.MicroAdam


def momentum_of(cls):
    """Options that give updates a momentum: MicroAdam has it in its betas."""
    return {"betas": (0.5, 0.9)} if cls is efcp.MicroAdam else {"momentum": 0.5}


def knows_length(cls):
    """Whether a class knows the length of an update before it takes it, as `max_update_norm` needs."""
    return "Adam" not in cls.__name__


def small(cls):
    """Options with which a class keeps little, and moves much."""
    options = {"window": 4, "lr": 0.02}
    if is_sparse(cls):
        options |= {"density": 0.5, "block_size": 8}
    if "LowRank" in cls.__name__:
        options |= {"rank": 2}
    return options | ({"damping": 0.1} if "MFAC" in cls.__name__ else {"eps": 1e-3})


class Regression:
    """A small network that learns fixed targets; the same for the same seed."""

    def __init__(self, cls, options, *, seed=0, dtype=torch.float32, split=False, named=False):
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(0.5 * torch.randn(p.shape, generator=generator))
        self.x = torch.randn(24, 6, generator=generator).to(dtype)
        self.y = torch.randn(24, 3, generator=generator).to(dtype)
        params = list(self.model.named_parameters() if named else self.model.parameters())
        if split:
            params = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5 * float(options["lr"])}]
        own = {name: value.clone() if torch.is_tensor(value) else value for name, value in options.items()}
        self.optimizer = cls(params, **own)  # schedulers write into an lr that is a tensor
        self.sign = -1 if options.get("maximize") else 1

    @property
    def params(self):
        return list(self.model.parameters())

    def loss(self, model=None):
        return self.sign * nn.functional.mse_loss((model or self.model)(self.x), self.y)

    def error(self):
        return self.sign * self.loss().item()

    def backward(self):
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def step(self, times=1):
        for _ in range(times):
            self.backward()
            self.optimizer.step()

    def flat(self):
        return torch.cat([p.detach().reshape(-1) for p in self.params])


def assert_same(a, b):
    """Two regressions with the same parameters and state of the optimizer, bit for bit."""
    assert torch.equal(a.flat(), b.flat())
    left, right = a.optimizer.state_dict(), b.optimizer.state_dict()
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for key, state in left["state"].items():
        assert state.keys() == right["state"][key].keys()
        for name, value in state.items():
            other = right["state"][key][name]
            assert type(value) is type(other), name
            if isinstance(value, torch.Tensor):
                assert value.dtype == other.dtype, name
                assert torch.equal(value, other), name
            else:
                assert value == other, name
