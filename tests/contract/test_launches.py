"""A step launches as many kernels for two hundred parameters as for two."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from efcp import SparseMFAC
from efcp.kernels import use_backend
from efcp.perf.gpu.gpusim import simulate, why_unavailable

if reason := why_unavailable():
    pytest.skip(reason, allow_module_level=True)


class Operations(TorchDispatchMode):
    """Counts operations of PyTorch that take time on a device: not views, and not allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and "empty" not in function.__name__:
            self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def launches(numels, **options):
    """(operations of PyTorch, kernels) of the third step."""
    params = [torch.nn.Parameter(torch.randn(numel)) for numel in numels]
    optimizer = SparseMFAC(params, window=4, block_size=64, density=0.1, **options)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.allocate_state()
    with use_backend("triton"), simulate(90) as simulator:
        for p in params:
            state = [x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)]
            for tensor in (p.data, p.grad, *state):
                simulator.allow(tensor)
        optimizer.step()
        optimizer.step()
        before = len(simulator.launches)
        with Operations() as operations:
            optimizer.step()
    return operations.names, [launch.kernel for launch in simulator.launches[before:]]


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9, "weight_decay": 0.1, "max_update_norm": 1.0}], ids=["plain", "all options"]
)
def test_launches_do_not_grow_with_the_number_of_parameters(options):
    few = launches([200, 30], **options)
    many = launches([200, 30] * 20 + list(range(1, 161)), **options)
    assert many == few
    assert len(few[1]) == 4  # finite, compress, dots, apply
