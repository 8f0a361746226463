"""What surrounds a step in training: mixed precision, clipping, accumulation, schedulers, averaged weights."""

import itertools

import pytest
import torch
from torch.amp import GradScaler
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from efcp import DenseGGT, MicroAdam, SparseMFAC
from tests.contract.optimizers import Regression, assert_same, momentum_of, small

# ---- mixed precision


def test_step_that_the_scaler_skips_changes_nothing(cls, options):
    problem, other = Regression(cls, options), Regression(cls, options)
    problem.step(5)
    other.step(5)
    scaler = GradScaler("cpu", init_scale=4.0)
    problem.optimizer.zero_grad()
    (scaler.scale(problem.loss()) * torch.inf).backward()
    scaler.step(problem.optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert problem.optimizer.skipped_steps == 0
    assert_same(problem, other)
    problem.step()
    other.step()
    assert_same(problem, other)


@pytest.mark.parametrize("clip", [False, True], ids=["", "clip"])
def test_scaled_gradients_are_steps_of_unscaled_ones(cls, options, clip):
    """Scales are powers of two, hence exact; with unscale_, gradients can be clipped before the step."""
    plain, scaled = Regression(cls, options), Regression(cls, options)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    for _ in range(6):
        plain.backward()
        scaled.optimizer.zero_grad()
        scaler.scale(scaled.loss()).backward()
        if clip:
            scaler.unscale_(scaled.optimizer)
            norms = [torch.nn.utils.clip_grad_norm_(p.params, 0.1) for p in (plain, scaled)]
            assert norms[0] == norms[1] > 0.1
        plain.optimizer.step()
        scaler.step(scaled.optimizer)
        scaler.update()
    assert_same(plain, scaled)


def test_autocast(cls, options):
    problem = Regression(cls, options)
    first = problem.error()
    for _ in range(12):
        problem.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = problem.loss()
        loss.backward()
        problem.optimizer.step()
    assert problem.error() < first


def test_accumulated_gradients_are_those_of_the_large_batch(cls, options):
    large, parts = Regression(cls, options, dtype=torch.float64), Regression(cls, options, dtype=torch.float64)
    for _ in range(3):
        large.step()
        parts.optimizer.zero_grad()
        for x, y in zip(parts.x.chunk(4), parts.y.chunk(4), strict=True):
            (torch.nn.functional.mse_loss(parts.model(x), y) / 4).backward()
        parts.optimizer.step()
    torch.testing.assert_close(large.flat(), parts.flat(), rtol=1e-5, atol=1e-6)


# ---- schedulers

SCHEDULERS = {
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 4]),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.5, total_iters=3),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.05, step_size_up=2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.05, total_steps=9),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=0.9),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.005, anneal_epochs=3),
}
CYCLE_MOMENTUM = ("CyclicLR", "OneCycleLR")


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("cls", [SparseMFAC, DenseGGT, MicroAdam])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(cls, name, tensor):
    """Saved in the middle and loaded into new objects, training goes on with the same bits."""
    options = small(cls) | (momentum_of(cls) if name in CYCLE_MOMENTUM else {})
    options |= {"lr": torch.tensor(0.02)} if tensor else {}

    def make():
        problem = Regression(cls, options, split=True)
        return problem, SCHEDULERS[name](problem.optimizer)

    def advance(problem, scheduler):
        problem.step()
        scheduler.step(*([problem.error()] if name == "ReduceLROnPlateau" else []))
        seen.append(tuple(float(group["lr"]) for group in problem.optimizer.param_groups))
        group = problem.optimizer.param_groups[0]
        momenta.add(tuple(group["betas"]) if cls is MicroAdam else group["momentum"])

    seen, momenta = [], set()
    problem, scheduler = make()
    for _ in range(4):
        advance(problem, scheduler)
    resumed, resumed_scheduler = make()
    resumed.model.load_state_dict(problem.model.state_dict())
    resumed.optimizer.load_state_dict(problem.optimizer.state_dict())
    resumed_scheduler.load_state_dict(scheduler.state_dict())
    for _ in range(3):
        advance(problem, scheduler)
        advance(resumed, resumed_scheduler)
    assert_same(problem, resumed)
    assert len(set(seen)) > 1
    assert (len(momenta) > 1) == (name in CYCLE_MOMENTUM)


# ---- averaged weights


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
def test_averaged_weights(cls, options, average):
    problem = Regression(cls, options)
    averaged = AveragedModel(problem.model, multi_avg_fn=average)
    history = []
    for _ in range(5):
        problem.step()
        averaged.update_parameters(problem.model)
        history.append(problem.flat())
    update_bn([problem.x], averaged)
    own = torch.cat([p.detach().reshape(-1) for p in averaged.module.parameters()])
    if average is None:
        torch.testing.assert_close(own, torch.stack(history).mean(0))
    else:
        expected = history[0]
        for value in itertools.islice(history, 1, None):
            expected = 0.9 * expected + 0.1 * value
        torch.testing.assert_close(own, expected)
    assert torch.equal(history[-1], problem.flat())
