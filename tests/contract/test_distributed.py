"""Data-parallel training: parameters and state stay the same on every rank, with no exchange but that of gradients."""

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tests.contract.optimizers import CLASSES, small

RANKS = 2


def train(rank, folder):
    """Trains with every optimizer, and saves what each leaves on this rank."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    results = {}
    for cls in CLASSES:
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 3)))
        torch.manual_seed(100 + rank)  # data differ from here on, and so would whatever else is random
        optimizer = cls(model.parameters(), **small(cls))
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(4, 9)).square().mean().backward()
            optimizer.step()
        results[cls.__name__] = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()["state"]}
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(train, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("name", [cls.__name__ for cls in CLASSES])
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
