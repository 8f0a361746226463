"""Experiments in files: `experiments/NAME.toml` says what is trained, with which methods, grids and seeds.

    title = "..."                                   # above plots
    [task]                                          # the fields of efcp.analysis.tasks.Task
    network = "small-cnn"
    data_set = "fashion-mnist"
    train_size = 20000
    ...
    [seeds]
    tuning = [1000]                                 # of the runs that choose a point of a grid
    final = [0, 1, 2]                               # of the runs at the chosen point
    [grids.windowed]                                # every combination is tried; all grids are equally large
    lr = [0.01, 0.03]
    damping = [1e-3, 1e-2]
    [[methods]]                                     # in the order in which they run
    name = "sparse M-FAC"                           # or several, of efcp.analysis.methods.CONSTRUCTORS
    grid = "windowed"
    window = 128                                    # options; lists make a method of every combination
    density = [0.1, 0.01]
    map = { lr = [0.001], damping = [1e-4] }        # more points that are run, but never chosen

A method that several tables make is run once. A list of data sets, or of batch sizes, makes an experiment of each, with
a folder of its own inside that of the file. `epochs` may then be a table with a number for each data set.
"""

import importlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from efcp.analysis.data import DataSet
from efcp.analysis.methods import Method, named_method
from efcp.analysis.running import Plan
from efcp.analysis.tasks import DATA_SETS, DECAYS, Task
from efcp.analysis.training import Run

FOLDER = Path(__file__).parent / "experiments"
_TASK = tuple(f.name for f in fields(Task) if f.name != "input_shape")
_LISTED = {"data_set": str, "batch_size": int}  # fields of the task that may be lists, one of them in a file
_SETTINGS = ("batch_size", "epochs")  # fields of the task that a method may replace
_KINDS = {int: "integers", str: "texts"}
_KEYS = {"title": str, "task": dict, "seeds": dict, "grids": dict, "methods": list}


@dataclass(frozen=True)
class Entry:
    """A method with its options that are not tuned, settings that replace the task's, and the points of its runs."""

    name: str
    options: dict[str, Any]
    settings: dict[str, Any]
    points: list[dict[str, float]]
    map: list[dict[str, float]]

    def method(self, point: dict[str, float]) -> Method:
        """The method at a point of its grid. The learning rate is left out, as it is no option of a method."""
        tuned = {name: value for name, value in point.items() if name != "lr"}
        return named_method(self.name, self.options | tuned)


@dataclass(frozen=True)
class Experiment:
    """The content of a configuration file, or its part for one data set or batch size."""

    name: str
    title: str
    task: dict[str, Any]
    tuning_seeds: Sequence[int]
    final_seeds: Sequence[int]
    entries: Sequence[Entry]

    @property
    def group(self) -> str:
        """The name of the file, if it holds several experiments; else empty."""
        return self.name.rpartition("/")[0]

    def plans(self, data: DataSet) -> list[Plan]:
        """The runs of each method.

        Raises:
            ValueError: where a batch does not fit into the training split.
        """
        train_size, *shape = data.train.inputs.shape
        task = Task(input_shape=tuple(shape), **{**self.task, "train_size": train_size})
        plans = []
        for entry in self.entries:
            own = replace(task, **entry.settings)
            if own.batch_size > train_size:
                raise ValueError(
                    f"{self.name}: batch_size must be at most the training size {train_size}, got {own.batch_size}"
                )
            tuning = _runs("tune", own, entry, entry.points, self.tuning_seeds)
            plans.append(Plan(tuning, self.final_seeds, _runs("map", own, entry, entry.map, self.tuning_seeds)))
        return plans


def find_experiment(name: str) -> Path:
    """The file of an experiment, by its name or path.

    Raises:
        ValueError: if there is none.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        raise ValueError(f"an experiment must be a .toml file or one of {', '.join(names())}, got {name!r}")
    return path


def names() -> list[str]:
    """Lists the experiments that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_experiments(path: Path) -> list[Experiment]:
    """Reads and checks the file of an experiment, or of one for each of its data sets or batch sizes.

    Raises:
        ValueError: for what cannot be run; it names file, place and value, and what is allowed.
    """
    try:
        toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
        content = toml.loads(path.read_text(encoding="utf-8"))
        task, title = content.get("task"), content.get("title")
        key = next((key for key in _LISTED if isinstance(task, dict) and isinstance(task.get(key), list)), None)
        if key is None:
            return [_experiment(path.stem, content)]
        _check_list(f"task.{key}", task[key], _LISTED[key])
        epochs = task.get("epochs")
        own: dict[Any, dict[str, Any]] = {value: {key: value} for value in task[key]}
        if key == "data_set" and isinstance(epochs, dict):
            _check_keys("task.epochs", epochs, task[key], required=task[key])
            own = {name: {key: name, "epochs": epochs[name]} for name in task[key]}
        return [
            _experiment(
                f"{path.stem}/{_called(key, value)}",
                {**content, "title": f"{title}: {_called(key, value, ' ')}", "task": {**task, **own[value]}},
            )
            for value in task[key]
        ]
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _called(key: str, value: Any, space: str = "-") -> str:
    return f"batch{space}{value}" if key == "batch_size" else str(value)


def _experiment(name: str, content: dict[str, Any]) -> Experiment:
    _check_keys("the file", content, _KEYS, required=tuple(_KEYS))
    for key, kind in _KEYS.items():
        if not isinstance(content[key], kind):
            raise ValueError(f"{key} must be a {'table' if kind is dict else kind.__name__}, got {content[key]!r}")
    task, seeds, grids = content["task"], content["seeds"], content["grids"]
    _check_task(task)
    _check_keys("[seeds]", seeds, ("tuning", "final"), required=("tuning", "final"))
    for key in ("tuning", "final"):
        _check_list(f"seeds.{key}", seeds[key], int)
    if both := set(seeds["tuning"]) & set(seeds["final"]):
        raise ValueError(f"seeds.final must differ from seeds.tuning, both hold {', '.join(map(str, sorted(both)))}")
    points = {grid: _points(f"grids.{grid}", axes) for grid, axes in grids.items()}
    sizes = {grid: len(some) for grid, some in points.items()}
    if len(set(sizes.values())) > 1:
        sizes_text = ", ".join(f"{grid} has {size}" for grid, size in sizes.items())
        raise ValueError(f"all grids must have as many points, so that tuning is fair: {sizes_text}")
    entries: dict[tuple[str, str], Entry] = {}
    for number, table in enumerate(content["methods"]):
        for entry in _entries(f"methods[{number}]", table, points):
            entries.setdefault((entry.name, repr(sorted(entry.options.items()))), entry)
    return Experiment(name, content["title"], task, seeds["tuning"], seeds["final"], list(entries.values()))


def _entries(where: str, table: dict[str, Any], points: dict[str, list[dict[str, float]]]) -> Iterator[Entry]:
    for key in ("name", "grid"):
        if key not in table:
            raise ValueError(f"{where} lacks {key}")
    names = table["name"] if isinstance(table["name"], list) else [table["name"]]
    grid, extra = table["grid"], table.get("map")
    if grid not in points:
        raise ValueError(f"{where}: grid must be one of {', '.join(points)}, got {grid!r}")
    settings: dict[str, Any] = {key: table[key] for key in _SETTINGS if key in table}
    for key, value in settings.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: {key} must be an integer ≥ 1, got {value!r}")
    options = {key: value for key, value in table.items() if key not in ("name", "grid", "map", *_SETTINGS)}
    choices = [value if isinstance(value, list) else [value] for value in options.values()]
    more = [p for p in _points(f"{where}.map", extra) if p not in points[grid]] if extra else []
    for name, *combination in product(names, *choices):
        entry = Entry(name, dict(zip(options, combination, strict=True)), settings, points[grid], more)
        try:
            for point in (*entry.points, *entry.map):
                entry.method(point)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        yield entry


def _points(where: str, axes: Any) -> list[dict[str, float]]:
    """Every combination of the values of a grid."""
    if not isinstance(axes, dict) or "lr" not in axes:
        raise ValueError(f"{where} must be a table with lr, got {axes!r}")
    for name, values in axes.items():
        _check_list(f"{where}.{name}", values, (int, float))
        if not all(0 <= value < math.inf for value in values):
            raise ValueError(f"{where}.{name} must hold finite numbers ≥ 0, got {values}")
    return [dict(zip(axes, map(float, values), strict=True)) for values in product(*axes.values())]


def _runs(phase: str, task: Task, entry: Entry, points: list[dict[str, float]], seeds: Sequence[int]) -> list[Run]:
    return [Run(phase, task, entry.method(point), point["lr"], seed) for point in points for seed in seeds]


def _check_task(task: dict[str, Any]) -> None:
    required = ("network", "data_set", "epochs", "batch_size", "evaluations", "diagnostics")
    _check_keys("[task]", task, _TASK, required)
    if task["network"] not in DATA_SETS:
        raise ValueError(f"task.network must be one of {', '.join(DATA_SETS)}, got {task['network']!r}")
    needed = {
        "small-cnn": ("width",),
        "resnet20": ("width",),
        "minilm": ("layers",),
        "linear-probe": ("l2",),
        "autoencoder": (),
        "conv-autoencoder": ("width",),
        "gpt": ("width", "layers"),
        "pinn": ("width", "layers"),
    }
    _check_keys("[task]", task, _TASK, needed[task["network"]])
    allowed = DATA_SETS[task["network"]]
    if task["data_set"] not in allowed:
        raise ValueError(
            f"task.data_set must be one of {', '.join(allowed)} for {task['network']}, got {task['data_set']!r}"
        )
    for name in ("epochs", "batch_size", "train_size", "width", "layers", "evaluations", "diagnostics"):
        if name in task and (not isinstance(task[name], int) or task[name] < 1):
            raise ValueError(f"task.{name} must be an integer ≥ 1, got {task[name]!r}")
    for name, end in (("l2", math.inf), ("warm_up", 1)):
        if name in task and not (isinstance(task[name], (int, float)) and 0 <= task[name] < end):
            raise ValueError(f"task.{name} must lie in [0, {end:g}), got {task[name]!r}")
    if "decay" in task and task["decay"] not in DECAYS:
        raise ValueError(f"task.decay must be one of {', '.join(DECAYS)}, got {task['decay']!r}")


def _check_keys(where: str, table: dict[str, Any], allowed: Any, required: tuple[str, ...]) -> None:
    if missing := [key for key in required if key not in table]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    if unknown := [key for key in table if key not in allowed]:
        raise ValueError(f"{where} has no {', '.join(unknown)}; it has {', '.join(allowed)}")


def _check_list(where: str, values: Any, kind: Any) -> None:
    if not isinstance(values, list) or not values or not all(isinstance(v, kind) for v in values):
        raise ValueError(f"{where} must be a list of {_KINDS.get(kind, 'numbers')}, got {values!r}")
    if len(set(values)) < len(values):
        raise ValueError(f"{where} must be distinct, got {values}")
