"""How often the timer repeats its runs."""

import pytest
import torch

from efcp.perf.timing import ELEMENTS, LEAST_RUNS, MOST_RUNS, Timer


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Timer:
    """A timer whose runs return how many ms they pretend to take."""
    timer = Timer(torch.device("cpu"))
    monkeypatch.setattr(timer, "milliseconds", lambda run: run())
    return timer


def test_runs_are_taken_in_turn(timer: Timer) -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    times = timer.in_turn(runs, dict.fromkeys(runs, 0.0))
    assert "".join(order) == LEAST_RUNS * "abc"
    assert all(list(t) == LEAST_RUNS * [1.0] for t in times.values())


def test_what_was_slow_is_not_run_again(timer: Timer) -> None:
    times = timer.in_turn({"a": lambda: 5000.0, "b": lambda: 1.0}, {"a": 1.0, "b": 0.0}, {"a": 5000.0, "b": 0.0})
    assert list(times["a"]) == [5000.0]
    assert len(times["b"]) == LEAST_RUNS


def test_there_is_an_end(timer: Timer) -> None:
    assert len(timer.in_turn({"a": lambda: 0.0}, {"a": 1e9})["a"]) == MOST_RUNS


def test_a_run_is_timed() -> None:
    timer, ran = Timer(torch.device("cpu")), []
    assert timer.milliseconds(lambda: ran.append(1)) > 0
    assert ran == [1]


def test_bandwidth_counts_what_is_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ELEMENTS, "cpu", 1000)
    transfers = Timer(torch.device("cpu")).transfers
    assert {name: size for name, (_, size) in transfers.items()} == {"copy": 8000, "read": 4000}
    assert float(transfers["read"][0]()) == 1000


def test_temporaries_are_the_most_that_lives_at_once() -> None:
    vector, results = torch.ones(1000), []

    def run() -> None:
        first = vector + 1
        del first
        results.append((vector + 2) * 3)

    assert 8000 <= Timer(torch.device("cpu")).temporary_bytes(run) < 8500
    assert Timer(torch.device("cpu")).temporary_bytes(lambda: vector.add_(0)) < 500


def test_unknown_device() -> None:
    with pytest.raises(ValueError, match="device must be of type cpu or cuda, got 'meta'"):
        Timer(torch.device("meta"))
