"""The site has a page for each public name, and what its pages show runs."""

import inspect
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed

import efcp

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/extending").glob("*.md"))]


@pytest.fixture
def conf(monkeypatch):
    """docs/conf.py."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    import conf

    return conf


def blocks(page):
    """The Python that a page shows, one block after the other."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        weight = next(model.parameters())
        model(torch.randn(5, weight.shape[1], dtype=weight.dtype)).square().mean().backward()
        optimizer.step()


def test_every_public_name_has_a_page_of_the_api(conf, tmp_path):
    conf.write_api(tmp_path / "api")
    overview = (tmp_path / "api" / "index.md").read_text()
    for name in efcp.__all__:
        assert f":: {name}\n" in (tmp_path / "api" / f"{name}.md").read_text()
        assert f"\n{name}\n" in overview


def test_every_public_name_is_explained():
    for name in efcp.__all__:
        assert (getattr(efcp, name).__doc__ or "").strip(), name


@pytest.mark.parametrize("name", [name for name in efcp.__all__ if issubclass(type(getattr(efcp, name)), type)])
def test_every_argument_of_a_class_is_explained(name):
    cls = getattr(efcp, name)
    parts = (torch.optim.Optimizer, efcp.windows.Compressor, efcp.preconditioners.Preconditioner)
    if not issubclass(cls, parts) or inspect.isabstract(cls):
        pytest.skip("no options")
    for argument in inspect.signature(cls).parameters:
        assert re.search(rf"^\s+{argument}: ", cls.__doc__, re.MULTILINE), argument


def test_formulas_become_blocks(conf):
    assert conf.as_restructured_text(["A step:", "", "    u = |g|"]) == ["A step::", "", "    u = \\|g\\|"]


def test_names_with_a_text_become_a_list(conf):
    text = ["Returns:", "    Numbers:", "        a, b: norms, that", "            go on."]
    listed = ["Returns:", "    Numbers.", "", "        - **a, b**: norms, that", "          go on."]
    assert conf.as_restructured_text(text) == listed


@pytest.fixture
def torchrun(monkeypatch):
    """What torchrun sets for a single process."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    yield
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_what_a_page_shows_runs(page, tmp_path, monkeypatch, torchrun):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.body, model.head = torch.nn.Linear(20, 10), torch.nn.Linear(10, 10)
    optimizer = efcp.SparseMFAC(model.parameters(), window=4)
    train(model, optimizer, 1)
    names = {
        **{name: getattr(efcp, name) for name in efcp.__all__},
        **{"torch": torch, "efcp": efcp, "model": model, "step": 0, "log": lambda values: None},
        "optimizer": optimizer,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, block in enumerate(blocks(page)):
            exec(compile(block, f"{page.name}, block {number}", "exec"), names)
        train(names["model"], names["optimizer"], 3)
