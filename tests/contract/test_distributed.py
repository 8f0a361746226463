"""Data-parallel training: parameters and state stay the same on every rank, with no exchange but that of gradients.

What gives each rank a part of the parameters is refused.
"""

import io
import sys
import types

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from efcp import MicroAdam, SparseMFAC
from tests.contract.optimizers import SETTINGS, Regression, SparseGGT4, small

RANKS = 2


def train(rank, folder):
    """Trains with every optimizer, and saves what each leaves on this rank, and what ZeroRedundancyOptimizer says."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    results = {}
    for cls in SETTINGS:
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 3)))
        torch.manual_seed(100 + rank)  # data differ from here on, and so would whatever else is random
        optimizer = cls(model.parameters(), **small(cls))
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(4, 9)).square().mean().backward()
            optimizer.step()
        try:
            refusal = repr(ZeroRedundancyOptimizer(model.parameters(), cls, **small(cls)))
        except ValueError as error:
            refusal = str(error)
        results[cls.__name__] = {
            "model": model.module.state_dict(),
            "optimizer": optimizer.state_dict()["state"],
            "refusal": refusal,
        }
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(train, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("name", [cls.__name__ for cls in SETTINGS])
def test_ranks_stay_the_same(name, ranks):
    here, there = (result[name] for result in ranks)
    for key, value in here["model"].items():
        assert torch.equal(value, there["model"][key])
    assert here["optimizer"].keys() == there["optimizer"].keys() == set(range(4))
    for key, state in here["optimizer"].items():
        assert state.keys() == there["optimizer"][key].keys()
        for item, value in state.items():
            other = there["optimizer"][key][item]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


@pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("name", [cls.__name__ for cls in SETTINGS])
def test_zero_redundancy_optimizer_is_refused(name, ranks):
    for rank in ranks:
        assert "ZeroRedundancyOptimizer must have one process, got 2: it gives each " in rank[name]["refusal"]


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    if not distributed.is_available():
        pytest.skip("needs torch.distributed")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_zero_redundancy_optimizer_of_one_process(alone, cls, options):
    """It steps as ours does, up to the order of parameters in sums, and resumes bit for bit."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def zero(seed):
        problem = Regression(cls, options, seed=seed)
        problem.optimizer = ZeroRedundancyOptimizer(problem.model.parameters(), cls, **options)
        return problem

    if cls is MicroAdam:  # with an error in 4 bits small entries differ by as much as a step
        options = options | {"error_dtype": torch.float32}
    plain, whole, resumed = Regression(cls, options), zero(0), zero(0)
    plain.step(6)
    whole.step(6)
    # Parameters in another order have other random numbers for errors in 4 bits.
    tolerance = {"rtol": 0.1, "atol": 0.01} if cls is SparseGGT4 else {}
    torch.testing.assert_close(plain.flat(), whole.flat(), **tolerance)
    file = io.BytesIO()
    whole.optimizer.consolidate_state_dict()
    torch.save(whole.optimizer.state_dict(), file)
    file.seek(0)
    resumed.model.load_state_dict(whole.model.state_dict())
    resumed.optimizer.load_state_dict(torch.load(file, weights_only=True))
    whole.step(4)
    resumed.step(4)
    assert torch.equal(whole.flat(), resumed.flat())


# ---- DeepSpeed, or what ours sees of it


class ZeROOptimizer:
    """As DeepSpeed's of stage 1 does, puts flat partitions in place of parameters, and steps one group at a time."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            flat = torch.cat([p.detach().reshape(-1) for p in group["params"]])
            group["params"] = [nn.Parameter(flat[: len(flat) // 2].clone())]

    def step(self):
        groups = self.optimizer.param_groups
        for group in groups:
            self.optimizer.param_groups = [group]
            for p in group["params"]:
                p.grad = torch.ones_like(p)
            self.optimizer.step()
        self.optimizer.param_groups = groups


class Engine(ZeROOptimizer):
    """The same by a class that is none of DeepSpeed's ZeRO."""


@pytest.fixture
def deepspeed(monkeypatch):
    module = types.ModuleType("deepspeed.runtime.base_optimizer")
    module.ZeROOptimizer = type("ZeROOptimizer", (), {})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_step_within_zero_of_deepspeed_is_refused(deepspeed, cls, options):
    deepspeed.ZeROOptimizer = ZeROOptimizer
    zero = ZeROOptimizer(Regression(cls, options).optimizer)
    [p] = zero.optimizer.param_groups[0]["params"]
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="ZeROOptimizer of DeepSpeed must not step this optimizer: it gives each "):
        zero.step()
    assert torch.equal(p, before)
    assert not zero.optimizer.state


def test_step_beside_deepspeed_is_taken(deepspeed, cls, options):
    engine = Engine(Regression(cls, options).optimizer)
    [p] = engine.optimizer.param_groups[0]["params"]
    before = p.detach().clone()
    engine.step()
    assert not torch.equal(p, before)


def test_parameters_that_deepspeed_has_partitioned_are_refused():
    marked, plain = nn.Parameter(torch.ones(0)), nn.Parameter(torch.ones(3))
    marked.ds_id = 7
    message = "params must not be partitioned by ZeRO-3 of DeepSpeed, got ds_id 7: it gives each process a part"
    with pytest.raises(ValueError, match=message):
        SparseMFAC([plain, marked])
    optimizer = SparseMFAC([plain])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [marked]})
    assert len(optimizer.param_groups) == 1
