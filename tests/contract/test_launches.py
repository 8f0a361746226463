"""A step takes few launches, and as many for two hundred parameters as for two."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from efcp import SparseMFAC
from efcp.kernels import use_backend
from efcp.perf.gpu.gpusim import simulate, why_unavailable

if reason := why_unavailable():
    pytest.skip(reason, allow_module_level=True)


class Operations(TorchDispatchMode):
    """Counts operations of PyTorch that take time on a device: not views, and not allocations.

    Reading a counter for warnings is a copy on a GPU, once it has arrived, and does not count.
    """

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        none = ("empty", "_record_function", "_local_scalar_dense")
        if not function.is_view and not function.__name__.startswith(none):
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
    ("options", "count"),
    [({}, 9), ({"momentum": 0.9, "weight_decay": 0.1, "max_update_norm": 1.0}, 10)],
    ids=["plain", "all options"],
)
def test_launches_do_not_grow_with_the_number_of_parameters(options, count):
    few = launches([200, 30], **options)
    many = launches([200, 30] * 20 + list(range(1, 161)), **options)
    assert many == few
    assert len(few[1]) == 5  # compress, undo, dots, the algebra of M-FAC, apply
    assert len(few[0]) + len(few[1]) == count
