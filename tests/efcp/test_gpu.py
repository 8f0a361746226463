"""On a GPU: the same updates as on a CPU, and no step that waits for it. Needs one."""

import pytest
import torch

from efcp import MFAC, Identity, LowRank, TopK
from tests.efcp.problems import Problem

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


COMPRESSORS = {
    "dense": Identity(),
    "small": TopK(0.1, 16),
    "large": TopK(0.05, 4096),
    "low-rank": LowRank(2, value_dtype=torch.float32),
}


@pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_updates_are_those_of_the_cpu_and_nothing_waits(compressor, dtype):
    def problem():
        options = {"momentum": 0.9, "weight_decay": 0.1, "max_update_norm": 1.0}
        return Problem(
            shapes=[(5000,), (30, 7), ()], dtype=dtype, compressor=compressor, preconditioner=MFAC(), **options
        )

    here, there = problem(), problem()
    for p in there.params:
        p.data = p.data.cuda()
    for step in range(8):
        here.set_gradients()
        for p, q in zip(here.params, there.params, strict=True):
            q.grad = p.grad.cuda()
        here.optimizer.step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step not in (0, 5) else "default")  # Triton compiles in the first
        try:
            there.optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    tolerance = max(100 * torch.finfo(dtype).eps, 1e-2 if isinstance(compressor, LowRank) else 0)
    torch.testing.assert_close(there.flat().cpu(), here.flat(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("compressor", [Identity(), TopK(0.1, 16)], ids=["dense", "sparse"])
def test_state_moves_between_devices(compressor):
    """A state saved on a CPU goes on on a GPU, and back."""
    here, there, back = (Problem(compressor=compressor, momentum=0.9, lr=0.1) for _ in range(3))
    here.step(8)
    for p, q in zip(here.params, there.params, strict=True):
        q.data = p.detach().cuda()
    there.optimizer.load_state_dict(here.optimizer.state_dict())
    for state in there.optimizer.state.values():
        assert all(value.is_cuda for value in state.values() if isinstance(value, torch.Tensor))
    for p, q in zip(here.params, back.params, strict=True):
        q.data = p.detach().clone()
    back.optimizer.load_state_dict(there.optimizer.state_dict())
    for _ in range(3):
        here.set_gradients()
        for p, q, r in zip(here.params, there.params, back.params, strict=True):
            q.grad, r.grad = p.grad.cuda(), p.grad.clone()
        for problem in (here, there, back):
            problem.optimizer.step()
    assert torch.equal(back.flat(), here.flat())
    torch.testing.assert_close(there.flat().cpu(), here.flat(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_can_be_captured_in_a_graph(momentum):
    """And replayed: with other gradients in the same memory, a learning rate in a tensor, and a refresh in between."""

    def problem():
        lr = torch.tensor(0.1, device="cuda")
        made = Problem(
            shapes=[(5000,), (30, 7), ()], compressor=TopK(0.05, 64), preconditioner=MFAC(), lr=lr, momentum=momentum
        )
        for p in made.params:
            p.data = p.data.cuda()
            p.grad = torch.zeros_like(p)
        return made

    eager, captured = problem(), problem()
    generator = torch.Generator().manual_seed(0)

    def new_gradients(step):
        for p, q in zip(eager.params, captured.params, strict=True):
            grad = torch.randn(p.shape, generator=generator).cuda()
            p.grad.copy_(grad)
            q.grad.copy_(grad)
        for made in (eager, captured):
            made.optimizer.param_groups[0]["lr"].fill_(0.1 / (1 + step))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(3):
            new_gradients(step)
            eager.optimizer.step()
            captured.optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.optimizer.step()
    for step in range(3, 20):
        new_gradients(step)
        eager.optimizer.step()
        graph.replay()
        if step % 4 == 0:
            captured.optimizer.refresh()
    torch.testing.assert_close(captured.flat(), eager.flat(), rtol=1e-4, atol=1e-5)


def test_a_graph_can_be_replayed_after_many_steps_with_moving_gradients():
    """The tables of addresses that it reads are neither freed nor overwritten by other steps."""

    def problem():
        made = Problem(shapes=[(5000,), (30, 7)], compressor=TopK(0.05, 64), preconditioner=MFAC(), lr=0.1)
        for p in made.params:
            p.data = p.data.cuda()
        return made

    problems = eager, captured = problem(), problem()
    fixed = [[torch.zeros_like(p) for p in made.params] for made in problems]
    generator = torch.Generator().manual_seed(0)

    def set_gradients(moving):
        for number, (p, q) in enumerate(zip(eager.params, captured.params, strict=True)):
            grad = torch.randn(p.shape, generator=generator).cuda()
            for param, gradients in ((p, fixed[0]), (q, fixed[1])):
                param.grad = grad.clone() if moving else gradients[number].copy_(grad)

    def step(moving):
        set_gradients(moving)
        for made in problems:
            made.optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(moving=False)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    set_gradients(moving=False)
    with torch.cuda.graph(graph):
        captured.optimizer.step()
    for _ in range(300):
        step(moving=True)
    torch.cuda.empty_cache()
    rubbish = [torch.full((72,), -1, device="cuda") for _ in range(1000)]  # where freed tables were
    for _ in range(3):
        set_gradients(moving=False)
        eager.optimizer.step()
        graph.replay()
    torch.testing.assert_close(captured.flat(), eager.flat(), rtol=1e-4, atol=1e-5)
    del rubbish
