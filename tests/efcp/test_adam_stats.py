"""MicroAdam against a plain restatement of its paper in float64, and what the two corrections do."""

import math

import pytest
import torch

from efcp import EFCP, MFAC, AdamStats, Identity, LowRank, MicroAdam, TopK, estimate_memory, memory_report
from tests.efcp.problems import newest_slot, window_rows

BETAS, EPS, WINDOW = (0.9, 0.999), 1e-3, 4
COMPRESSORS = {
    "dense": Identity(),
    "sparse": TopK(density=0.3, block_size=16, value_dtype=torch.float32),
    "sparse, no error feedback": TopK(density=0.3, block_size=16, value_dtype=torch.float32, error_feedback=False),
}
compressors = pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)
corrections = pytest.mark.parametrize("correction", ["window", "step"])


class Paper:
    """MicroAdam (arXiv 2405.15593, algorithm 1) of one parameter in float64, as it is written, without quantisation."""

    def __init__(self, theta, compressor, correction, lr, weight_decay):
        self.theta, self.compressor, self.correction = theta.double().flatten(), compressor, correction
        self.lr, self.weight_decay = lr, weight_decay
        self.e, self.rows, self.t = torch.zeros_like(self.theta), [], 0

    def step(self, g):
        self.t += 1
        a = self.e + g.double().flatten()
        kept = torch.zeros_like(a)
        if isinstance(self.compressor, Identity):
            kept = a
        else:
            for own, block in zip(kept.split(16), a.split(16), strict=True):
                top = block.abs().topk(math.ceil(0.3 * len(block))).indices
                own[top] = block[top].float().double()
            self.e = a - kept if self.compressor.error_feedback else self.e
        self.rows = [kept, *self.rows][:WINDOW]  # the newest first: the position is the age
        n = self.t if self.correction == "step" else len(self.rows)
        (beta1, c1), (beta2, c2) = ((beta, (1 - beta) / (1 - beta**n)) for beta in BETAS)
        M = c1 * sum(beta1**age * V for age, V in enumerate(self.rows))
        W = c2 * sum(beta2**age * V**2 for age, V in enumerate(self.rows))
        self.theta = (1 - self.lr * self.weight_decay) * self.theta - self.lr * M / (W.sqrt() + EPS)


@corrections
@compressors
def test_steps_are_those_of_the_paper(compressor, correction):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).double()) for shape in ((7, 9), (50,), ())]
    optimizer = EFCP(params, 0.1, compressor, AdamStats(BETAS, EPS, correction), window=WINDOW, weight_decay=0.5)
    papers = [Paper(p.detach().clone(), compressor, correction, 0.1, 0.5) for p in params]
    for _ in range(3 * WINDOW):
        for p, paper in zip(params, papers, strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            paper.step(p.grad)
        optimizer.step()
        for p, paper in zip(params, papers, strict=True):
            torch.testing.assert_close(p.detach().flatten(), paper.theta, rtol=1e-9, atol=1e-9)
    assert not optimizer.shared["gram"].any()


@pytest.mark.parametrize(("correction", "expected"), [("window", 1.0), ("step", 6.53)])
def test_size_of_updates_for_a_constant_gradient(correction, expected):
    p = torch.nn.Parameter(torch.zeros(20, dtype=torch.float64))
    optimizer = MicroAdam([p], lr=1.0, density=1.0, correction=correction)
    for step in range(8_000 if correction == "step" else 30):
        before = p.detach().clone()
        p.grad = torch.linspace(-2, 2, 20).bfloat16().double()
        optimizer.step()
        if correction == "window" or step == 0:
            torch.testing.assert_close(p.detach() - before, -p.grad.sign(), rtol=1e-5, atol=0)
    assert (p.detach() - before).abs().mean().item() == pytest.approx(expected, abs=0.005)


def test_a_skipped_step_is_not_counted():
    """After steps with NaN, the first good one is corrected as a first step."""
    for correction in ("window", "step"):
        p = torch.nn.Parameter(torch.zeros(6))
        optimizer = MicroAdam([p], lr=1.0, density=1.0, correction=correction)
        for _ in range(3):
            p.grad = torch.full_like(p, float("nan"))
            optimizer.step()
        assert torch.equal(p, torch.zeros(6))
        p.grad = torch.ones_like(p)
        optimizer.step()
        torch.testing.assert_close(p.detach(), -torch.ones(6))


def test_entries_in_no_row_only_decay():
    p = torch.nn.Parameter(torch.ones(64))
    optimizer = MicroAdam([p], lr=0.1, weight_decay=0.5, density=1 / 64, error_feedback=False)
    for _ in range(3):
        p.grad = torch.linspace(0, 1, 64)
        optimizer.step()
    torch.testing.assert_close(p.detach()[:-1], torch.full((63,), 0.95**3))
    assert p[-1] < 0.95**3 - 0.2


@compressors
def test_diagnostics_recompute_the_update(compressor):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator).double()) for n in (70, 33)]
    optimizer = EFCP(params, 1.0, compressor, AdamStats(BETAS, EPS), window=WINDOW)
    for _ in range(6):
        before = torch.cat([p.detach().clone() for p in params])
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        u = before - torch.cat([p.detach() for p in params])
        c = torch.cat([window_rows(optimizer, p)[newest_slot(optimizer)] for p in params])
        found = optimizer.diagnostics(quantiles=True)
        assert found["compressed_norm"] == pytest.approx(c.norm().item())
        assert found["update_norm"] == pytest.approx(u.norm().item())
        assert found["cosine"] == pytest.approx((c @ u / (c.norm() * u.norm())).item())
        ratios = (u / torch.cat([p.grad for p in params])).abs()
        median = torch.quantile(ratios, 0.5, interpolation="lower").item()
        assert found["scaling_q50"] == pytest.approx(median, rel=1e-3)
    params[0].grad[0] = float("inf")
    optimizer.step()
    found = optimizer.diagnostics()
    assert (found["compressed_norm"], found["update_norm"], found["cosine"]) == (0.0, 0.0, None)


@pytest.mark.parametrize("numel", [1 << 20, 50 * 4096 + 17])
def test_state_takes_less_than_a_byte(numel):
    p = torch.nn.Parameter(torch.zeros(numel))
    optimizer = MicroAdam([p])
    p.grad = torch.randn(numel)
    optimizer.step()
    report = memory_report(optimizer)
    assert report == estimate_memory([p], MicroAdam)
    assert 0.92 <= report.per_parameter <= 0.97


class MFACOverAdam(MFAC):
    """M-FAC's combination of rows, divided by Adam's second moments."""

    def square_weights(self, gram, slot):
        return AdamStats(BETAS, EPS).square_weights(gram, slot)


@compressors
def test_any_weights_can_be_divided_by_second_moments(compressor):
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(50, generator=generator).double())
    optimizer = EFCP([p], 1.0, compressor, MFACOverAdam(damping=0.1), window=WINDOW)
    for step in range(1, 8):
        before = p.detach().clone()
        p.grad = torch.randn(50, generator=generator, dtype=torch.float64)
        optimizer.step()
        G, slot = window_rows(optimizer, p), newest_slot(optimizer)
        S, age = G @ G.t(), (slot - torch.arange(WINDOW)) % WINDOW
        w = torch.linalg.inv(0.1 * torch.eye(WINDOW).double() + S / WINDOW)[:, slot]
        beta2 = BETAS[1]
        c2 = (1 - beta2) / (1 - beta2 ** min(step, WINDOW))
        expected = G.t() @ w / ((G.square().t() @ (c2 * beta2 ** age.double())).sqrt() + EPS)
        torch.testing.assert_close(before - p.detach(), expected, rtol=1e-6, atol=1e-6)
        assert optimizer.diagnostics()["update_norm"] == pytest.approx(expected.norm().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@compressors
def test_heavy_ball_goes_along_the_divided_update(compressor, dtype):
    p = torch.nn.Parameter(torch.zeros(50, dtype=dtype))
    optimizer = EFCP([p], 1.0, compressor, AdamStats((0.0, 0.9), EPS), window=3, momentum=0.5)
    alone = torch.nn.Parameter(torch.zeros(50, dtype=dtype))
    without = EFCP([alone], 1.0, compressor, AdamStats((0.0, 0.9), EPS), window=3)
    velocity = torch.zeros(50)
    for _ in range(5):
        p.grad = alone.grad = torch.randn(50).to(dtype)
        before = alone.detach().clone()
        for one in (optimizer, without):
            one.step()
        velocity = 0.5 * velocity + (before - alone.detach()).float()
    tolerance = {torch.bfloat16: 0.1}.get(dtype, 1e-5)
    torch.testing.assert_close(optimizer.state[p]["momentum"].float(), velocity, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"direction": "average"}, ValueError, "direction must not be 'average' with AdamStats, which has no weights"),
        ({"direction": "momentum"}, ValueError, "direction must not be 'momentum' with AdamStats, which has no"),
        ({"update_rms": 0.2}, ValueError, "update_rms must be None with AdamStats, which does not know the length"),
        ({"max_update_norm": 1.0}, ValueError, "max_update_norm must be None with AdamStats, which does not know"),
        ({"compressor": LowRank()}, TypeError, "compressor must not be efcp.LowRank with AdamStats: factors give no"),
        ({"preconditioner": MFACOverAdam(), "update_rms": 0.2}, ValueError, "update_rms must be None with MFACOverAda"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_it_does_not_go_with_is_refused(options, error, message):
    known = {"compressor": TopK(), "preconditioner": AdamStats(), "window": 3}
    with pytest.raises(error, match=message):
        EFCP([torch.nn.Parameter(torch.zeros(3, 3))], **known | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0.9"),
        ({"eps": 0.0}, "eps must be a finite number ≥ 1.17549e-38, got 0.0"),
        ({"correction": "none"}, "correction must be one of window, step, got 'none'"),
    ],
    ids=["betas", "one beta", "eps", "correction"],
)
def test_options_that_are_not_allowed_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdamStats(**options)
    with pytest.raises(ValueError, match=message):
        MicroAdam([torch.nn.Parameter(torch.zeros(3))], **options)


def test_betas_of_adamw_are_its_own():
    """Groups that AdamW steps have an option of that name, too; all others must agree."""
    params = [torch.nn.Parameter(torch.ones(30)) for _ in range(3)]
    groups = [{"params": params[:1], "adamw": True, "betas": (0.8, 0.9)}, {"params": params[1:2]}]
    optimizer = MicroAdam(groups, betas=(0.9, 0.99))
    assert [group["betas"] for group in optimizer.param_groups] == [[0.8, 0.9], [0.9, 0.99]]
    for p in params[:2]:
        p.grad = torch.ones(30)
    optimizer.step()
    optimizer.add_param_group({"params": params[2:], "betas": (0.5, 0.9)})
    with pytest.raises(ValueError, match="betas must be the same in all param groups"):
        optimizer.step()


def test_windows_without_squares_say_so():
    class Squared(MFAC):
        def square_weights(self, gram, slot):
            return torch.ones_like(gram.matrix[0]), torch.ones_like(gram.matrix[0, 0])

    p = torch.nn.Parameter(torch.zeros(30, 30))
    optimizer = EFCP([p], 1.0, LowRank(2), Squared(), window=3)
    p.grad = torch.ones(30, 30)
    with pytest.raises(NotImplementedError, match="LowRankWindow has no squares, which square_weights need"):
        optimizer.step()
