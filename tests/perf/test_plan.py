"""The plan of a sharded training agrees with the estimates, and counts what a step sends."""

import json

import pytest
import torch

pytest.importorskip("pandas")
from efcp import SparseMFAC, estimate_memory
from efcp.perf.plan import main, plan


def test_state_is_the_estimate_of_a_share(capsys):
    main(["--params", "1e6", "1e9", "--ranks", "8", "--window", "32", "--density", "0.02", "--error", "int8", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["params"] for row in rows] == [10**6, 10**9]
    for row in rows:
        share = row["params"] // 8
        expected = estimate_memory(share, SparseMFAC, window=32, density=0.02, error_dtype=torch.int8).total
        assert row["state bytes"] == expected
        assert row["a parameter"] == expected / share


def test_bytes_that_are_sent_do_not_grow_with_the_model():
    rows = [plan(params, 64, 128, 0.01, "float32", "H100 SXM") for params in (10**9, 10**11)]
    assert rows[0]["sent bytes"] == rows[1]["sent bytes"] == round(2 * 63 / 64 * (4 + 8 * 128))
    assert rows[1]["FSDP's"] == pytest.approx(100 * rows[0]["FSDP's"])
    assert plan(10**9, 1, 128, 0.01, "float32", "H100 SXM")["sent bytes"] == 0


def test_a_step_takes_less_with_fewer_bytes():
    large = plan(10**9, 8, 128, 0.01, "float32", "H100 SXM")
    small = plan(10**9, 8, 32, 0.01, "int8", "H100 SXM")
    assert small["step ms"] < large["step ms"]
    assert plan(10**9, 8, 32, 0.01, "int8", "A100 SXM 80 GB")["step ms"] > small["step ms"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--params", "0"], "params must be at least 1, got 0"),
        (["--params", "1e9", "--ranks", "0"], "ranks must be at least 1, got 0"),
        (["--params", "1e9", "--density", "2"], "density must lie in (0, 1], got 2"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
