"""The sweep: what is measured, that it is right before it is timed, and that one failure loses nothing else."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

pytest.importorskip("numba")

from efcp.kernels import cpu
from efcp.perf import bench, implementations, timing
from efcp.perf.implementations import OPERATIONS
from efcp.perf.problems import DTYPES, Case, Problem, remove_ties_
from efcp.perf.tables import write_csv
from efcp.perf.timing import Timer
from tests.perf.bench_rows import bench_rows

EVERY = tuple(OPERATIONS)
TINY = Case(8 * 256, 5, 0.1, block_size=256)
ODD = Case(7 * 63, 3, 0.05, block_size=63)
IMPLEMENTATIONS = {
    "norm_is_finite": {"efcp", "definition"},
    "compress_": {"efcp", "definition", "torch.topk", "published"},
    "window_dots": {"efcp", "definition", "torch.sparse", "published"},
    "window_apply_": {"efcp", "definition", "torch.sparse", "published"},
    "step": {"efcp", "definition", "published", "Adam, fused", "Adam, foreach", "SGD, fused", "SGD, foreach"},
}


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Timer:
    monkeypatch.setitem(timing.ELEMENTS, "cpu", 1024)  # no time depends on it here
    return Timer(torch.device("cpu"))


def run(timer: Timer, path: Path, *cases: Case, operations: tuple[str, ...] = EVERY) -> pd.DataFrame:
    return bench.sweep([(case, operations) for case in cases], timer, 0.0, path / "bench.csv")


@pytest.mark.parametrize("case", [TINY, ODD], ids=["tiny", "odd"])
def test_every_implementation_is_right_and_gets_a_row(timer: Timer, tmp_path: Path, case: Case) -> None:
    run(timer, tmp_path, case)
    frame = pd.read_csv(tmp_path / "bench.csv")
    assert list(frame.columns) == bench.COLUMNS
    assert set(frame["status"]) == {"ok"}
    assert frame.groupby("operation")["implementation"].agg(set).to_dict() == IMPLEMENTATIONS
    assert frame.drop(columns=["temporary bytes", "commit"]).notna().all(axis=None)
    assert (frame["p20_ms"] <= frame["p50_ms"]).all()
    assert (frame["p50_ms"] <= frame["p80_ms"]).all()
    speed = frame["bytes"] / frame["p50_ms"] / 1e6
    assert ((frame["GB/s"] - speed).abs() <= 1e-4 * speed).all()


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != TINY.dtype])
def test_other_dtypes_have_the_definition_beside_ours(timer: Timer, tmp_path: Path, dtype: str) -> None:
    frame = run(timer, tmp_path, replace(TINY, dtype=dtype))
    assert set(frame["status"]) == {"ok"}
    assert set(frame["implementation"]) == {"efcp", "definition"}


@pytest.mark.parametrize("operation", ["compress_", "window_dots", "window_apply_"])
def test_a_wrong_result_gets_no_time(
    timer: Timer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    right = getattr(cpu, operation)

    def wrong(*arguments: object) -> object:
        result = right(*arguments)
        changed = result if operation == "window_dots" else arguments[1 if operation == "compress_" else 0][0]
        changed[0] += 0.1 * changed.abs().max()
        return result

    monkeypatch.setattr(cpu, operation, wrong)
    frame = run(timer, tmp_path, TINY, operations=(operation,)).set_index("implementation")
    assert frame["status"]["efcp"] == "wrong"
    assert frame.loc["efcp", ["p20_ms", "p50_ms", "p80_ms", "GB/s"]].isna().all()
    assert set(frame["status"].drop("efcp")) == {"ok"}


@pytest.mark.parametrize("name", ["published", "torch.sparse", "torch.topk"])
def test_others_are_checked_as_well(name: str) -> None:
    problem = Problem.random(TINY, torch.device("cpu"))
    for operation, build in OPERATIONS.items():
        with problem.newest_row_kept():
            built = build(problem)
            built["definition"].run()
            right = [result.clone() for result in built["definition"].results()]
            if name in built:
                built[name].run()
                for result, expected in zip(built[name].results(), right, strict=True):
                    result += 0.1 * expected.abs().max()
                    assert not bench.agree([result], [expected], built[name].tolerance), operation


def test_nan_does_not_agree() -> None:
    assert not bench.agree([torch.tensor([1.0, float("nan")])], [torch.tensor([1.0, 2.0])], 1.0)


def test_a_failure_loses_nothing_else(timer: Timer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(problem: Problem) -> object:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nand more")

    monkeypatch.setitem(implementations.OPERATIONS, "window_dots", fails)
    frame = run(timer, tmp_path, TINY).set_index(["operation", "implementation"])["status"]
    assert frame.pop(("window_dots", "efcp")) == "RuntimeError: DefaultCPUAllocator: can't allocate memory"
    assert set(frame) == {"ok"}


def test_what_does_not_fit_is_not_tried(timer: Timer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = Case(1 << 12, 1 << 20, 1.0)
    monkeypatch.setattr(bench, "available_bytes", lambda device: 1 << 30)
    frame = run(timer, tmp_path, large, TINY, operations=("compress_",))
    assert frame["status"][0].startswith("MemoryError: needs about ")
    assert set(frame["status"][1:]) == {"ok"}


def test_operations_leave_the_problem_as_it_was(timer: Timer) -> None:
    problem = Problem.random(TINY, torch.device("cpu"))
    tensors = (problem.values, problem.indices, problem.grad, problem.error, problem.target)
    before = [tensor.clone() for tensor in tensors]
    for operation in OPERATIONS:
        assert {row["status"] for row in bench.measure(operation, problem, timer, 0.0)} == {"ok"}
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("case", [TINY, ODD], ids=["tiny", "odd"])
def test_formats_hold_the_same_window(case: Case) -> None:
    problem = Problem.random(case, torch.device("cpu"))
    dense = torch.zeros(case.window, case.blocks.count, case.block_size)
    dense.scatter_(2, problem.indices.permute(1, 0, 2).long(), problem.values.permute(1, 0, 2).float())
    dense = dense.flatten(1)
    assert torch.equal(problem.csr().to_dense(), dense)
    assert torch.equal(problem.transposed_csr().to_dense(), dense.t())
    assert torch.equal(problem.newest_row(), dense[int(problem.slot)])
    torch.testing.assert_close(problem.gram(), dense.double() @ dense.double().t(), rtol=1e-12, atol=1e-12)


def test_ties_at_the_threshold_are_removed() -> None:
    grad, error = torch.tensor([3.0, -1.0, 1.0, 1.0, 2.0, 2.0, 0.0, 0.5]), torch.zeros(8)
    remove_ties_(grad, error, Case(8, 1, 0.5, block_size=4).blocks)  # two of each four are kept
    assert sorted(grad[:4].abs().tolist()) == [0.0, 0.0, 1.0, 3.0]
    assert grad[4:].tolist() == [2.0, 2.0, 0.0, 0.5]


def test_a_wrong_result_that_took_long_breaks_nothing(
    timer: Timer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "agree", lambda results, expected, tolerance: False)
    frame = run(timer, tmp_path, TINY, operations=("compress_",)).set_index("implementation")["status"]
    assert frame.pop("definition") == "ok"
    assert set(frame) == {"wrong"}


def test_floors() -> None:
    floors = Case(1 << 20, 256, 0.01).floors
    row = 256 * 41 * 4  # blocks · k · (bfloat16 and int16)
    assert floors["norm_is_finite"] == 4 << 20
    assert floors["compress_"] == (12 << 20) + row
    assert floors["window_dots"] == 256 * row
    assert floors["window_apply_"] == 256 * row + (8 << 20)
    assert floors["step"] == sum(floors[operation] for operation in ("compress_", "window_dots", "window_apply_"))


@pytest.mark.parametrize(("error", "size"), [("int8", 64 + 4), ("int4", 32 + 4)])  # codes and a scale of 64 elements
def test_floors_of_errors_in_few_bits(error: str, size: int) -> None:
    case = replace(TINY, block_size=64, dtype=f"fp32/{error}/bf16")
    draws = 8 if error == "int4" else 0
    row = case.window_bytes // case.window
    assert case.floors["compress_"] == 4 * case.numel + 2 * (case.numel // 64 * size + draws) + row


@pytest.mark.parametrize("quick", [True, False])
def test_no_case_is_measured_twice(quick: bool) -> None:
    work = [(case, operation) for case, operations in bench.grid(quick) for operation in operations]
    assert len(work) == len(set(work))


def test_the_full_grid_has_what_it_should() -> None:
    cases = [case for case, operations in bench.grid(False) if operations == EVERY]
    for d in (bench.MEDIUM, bench.LARGE):
        assert {0.001, 0.01, 0.05, 0.1} <= {c.density for c in cases if (c.numel, c.window) == (d, 256)}
    assert {c.density for c in cases} == set(bench.DENSITIES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"numel": 1000}, "numel must be a positive multiple of block_size, 256, got 1000"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"density": 1.5}, r"density must lie in \(0, 1\], got 1.5"),
        ({"block_size": 40000}, r"block_size must lie in \[1, 32768\], got 40000"),
        ({"dtype": "fp8"}, "dtype must be one of .*, got 'fp8'"),
    ],
)
def test_bad_cases(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "everything"], "invalid choice: 'everything'"),
        (["--plot-only", "--only", "sweep"], "--plot-only measures nothing"),
        (["--plot-only", "--out", "nowhere"], "--out must be a folder with CSVs of an earlier run, got nowhere"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_without_kernels_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EFCP_KERNELS", "reference")
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--out", str(tmp_path), "--device", "cpu"])
    assert "there are no kernels for cpu: pip install 'efcp[cpu]'" in capsys.readouterr().err


@pytest.mark.parametrize("only", [[], ["--only", "memory", "sweep"]], ids=["all", "only"])
def test_measurements_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str], only: list[str]) -> None:
    (tmp_path / "bench.csv").write_text("measured\n")
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--quick", "--device", "cpu", "--out", str(tmp_path), *only])
    message = f"{tmp_path} holds bench.csv already: choose another --out, other parts with --only, or delete"
    assert message in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"bench.csv": "measured\n"}


def test_a_part_joins_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(bench_rows(), tmp_path / "bench.csv")
    before = (tmp_path / "bench.csv").read_bytes()
    monkeypatch.setattr(bench.breakdown, "MEASURED", ())
    bench.main(["--only", "breakdown", "--device", "cpu", "--out", str(tmp_path)])
    assert (tmp_path / "bench.csv").read_bytes() == before
    assert (tmp_path / "breakdown.csv").exists()


def test_one_command_makes_tables_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(timing.ELEMENTS, "cpu", 1024)
    plan = [(replace(TINY, density=density), ("compress_", "step")) for density in (0.05, 0.1)]
    monkeypatch.setattr(bench, "grid", lambda quick: plan)
    bench.main(["--only", "sweep", "--quick", "--device", "cpu", "--out", str(tmp_path)])
    made = {path.name for path in tmp_path.iterdir()}
    assert {"bench.csv", "scaling.csv", "tables.md", "throughput.png", "speedup.png", "roofline.png"} <= made
    assert "compress_" in capsys.readouterr().out
