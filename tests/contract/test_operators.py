"""The operations as operators of PyTorch, and compilers around models and steps."""

import pytest
import torch
from torch.library import opcheck

from efcp import SparseMFAC, kernels
from efcp.kernels import Blocks, operators
from tests.contract.optimizers import Regression, assert_same, small

LAYOUTS = [(1, 4096, 0.01), (63, 16, 0.1), (1000, 256, 0.05), (4097, 4096, 0.01)]


@pytest.fixture(params=LAYOUTS, ids=str)
def layout(request):
    return request.param


def arguments(layout, *, window=3, error_dtype=torch.float32):
    """A window with three random rows, and what the operations take beside it."""
    blocks = Blocks(*layout)
    shape = (blocks.count, window, blocks.kept)
    values, indices = torch.zeros(shape), torch.zeros(shape, dtype=blocks.index_dtype)
    error = None if error_dtype is None else torch.zeros(blocks.numel, dtype=error_dtype)
    finite = torch.tensor(True)
    for row in range(window):
        grad = torch.randn(blocks.numel)
        kernels.compress_(grad, error, values, indices, torch.tensor([row]), finite, blocks)
    return blocks, torch.randn(blocks.numel), error, values, indices, torch.tensor([1]), finite


@pytest.mark.parametrize("error_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_compress_is_a_lawful_operator(layout, error_dtype):
    _, *given = arguments(layout, error_dtype=error_dtype)
    opcheck(operators.compress_, (*given, *layout))


def test_window_dots_is_a_lawful_operator(layout):
    _, _, _, values, indices, slot, _ = arguments(layout)
    opcheck(operators.window_dots, (values, indices, slot, *layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_window_apply_is_a_lawful_operator(layout, dtype):
    _, grad, _, values, indices, _, _ = arguments(layout)
    weights, scale = torch.randn(3, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    opcheck(operators.window_apply_, (grad.to(dtype), values, indices, weights, scale, *layout))


def operations(grad, error, values, indices, slot, finite, blocks):
    kernels.compress_(grad, error, values, indices, slot, finite, blocks)
    dots = kernels.window_dots(values, indices, slot, blocks)
    kernels.window_apply_(grad, values, indices, dots, torch.tensor(0.5), blocks)
    return dots


def test_a_graph_holds_each_operation_as_one_node(layout):
    torch._dynamo.reset()
    nodes = []

    def backend(graph, inputs):
        nodes.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    blocks, *given = arguments(layout)
    copies = [t.clone() for t in given]
    expected = operations(*given, blocks)
    actual = torch.compile(operations, fullgraph=True, backend=backend)(*copies, blocks)
    assert torch.equal(expected, actual)
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))
    ours = [str(node).rsplit("efcp.", 1)[1] for node in nodes if "efcp." in str(node)]
    assert [name.split(".")[0] for name in ours] == ["compress_", "window_dots", "window_apply_"], nodes


def test_functional_graph_gives_the_same_bits(layout):
    """Ahead-of-time autograd makes changes in place functional, and back."""
    torch._dynamo.reset()
    blocks, *given = arguments(layout)
    copies = [t.clone() for t in given]
    expected = operations(*given, blocks)
    actual = torch.compile(operations, fullgraph=True, backend="aot_eager")(*copies, blocks)
    assert torch.equal(expected, actual)
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))


def test_an_eager_step_calls_no_operator(monkeypatch):
    for name in ("compress_", "window_dots", "window_apply_"):
        monkeypatch.delattr(operators, name)
    blocks, *given = arguments(LAYOUTS[1])
    operations(*given, blocks)


def test_compiled_model(cls, options):
    torch._dynamo.reset()
    problem, compiled = Regression(cls, options), Regression(cls, options)
    model = torch.compile(compiled.model, backend="aot_eager")
    for _ in range(5):
        problem.step()
        compiled.optimizer.zero_grad()
        compiled.loss(model).backward()
        compiled.optimizer.step()
    torch.testing.assert_close(problem.flat(), compiled.flat())


def check_compiled_step(cls, options, steps):
    torch._dynamo.reset()
    problem, compiled = Regression(cls, options), Regression(cls, options)
    step = torch.compile(compiled.optimizer.step, backend="eager")
    for _ in range(steps):
        problem.step()
        compiled.backward()
        step()
    assert_same(problem, compiled)


def test_compiled_step():
    """Graphs break where state is made and blocks are looked up; results are those of the eager step, bit for bit."""
    check_compiled_step(SparseMFAC, small(SparseMFAC), 4)


@pytest.mark.slow
def test_compiled_step_of_all(cls, options):
    check_compiled_step(cls, options | {"momentum": 0.5, "weight_decay": 0.1}, 6)
