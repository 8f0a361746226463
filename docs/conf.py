"""The site: Sphinx, with pages in Markdown, and the API from the docstrings. `make docs` builds it into build/docs.

The source folder is the root of the repository, so pages may show and link whatever it holds (READMEs, plots, tables,
examples), and the same links work in the repository. A page is written for each name in `efcp.__all__`, and for each
script in examples/.
"""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
API, SCRIPTS = ROOT / "docs" / "api", ROOT / "docs" / "scripts"  # written here, not kept in git
sys.path.insert(0, str(ROOT))

import efcp  # noqa: E402  (this clone's)

GROUPS = {  # of the API's pages; names that are in none go to the last one
    "Optimizers": (
        "MFACW",
        "KroneckerW",
        "MicroAdam",
        "SparseMFAC",
        "DenseMFAC",
        "LowRankMFAC",
        "SparseGGT",
        "DenseGGT",
        "LowRankGGT",
        "EFCP",
    ),
    "Compressors": ("TopK", "LowRank", "Identity"),
    "Preconditioners": ("MFAC", "GGT", "Kronecker", "AdamStats"),
    "Low-rank Adam": ("GaLoreAdamW", "LDAdamW", "AdaRankGrad", "SubspaceAdam"),
    "Parts of low-rank Adam": (
        *("SVD", "RandomizedSVD", "PowerIteration", "DCT"),
        *("NoTransport", "LDAdamTransport", "NoError", "PlainError", "LDAdamError"),
    ),
    "Param groups": ("param_groups",),
    "Memory": ("estimate_memory", "memory_report", "MemoryReport"),
    "For parts of your own": (
        "Compressor",
        "Window",
        "SingleWindow",
        "Separate",
        "Preconditioner",
        "LocalPreconditioner",
    ),
}

SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:")  # of docstrings

project, author, release = "EFCP", "EFCP contributors", efcp.__version__
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/**",
    "examples/*.md",
    "analysis/*.md",
    "analysis/**/*.md",
    "perf/*.md",
    "perf/**/*.md",
]
exclude_patterns = ["README.md"]  # its first screen is that of docs/index.md
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

html_theme = "furo"
html_title = f"EFCP {release}"
html_show_sphinx = html_show_copyright = False
html_copy_source = html_show_sourcelink = False
html_static_path = ["static"]
html_css_files = ["extra.css"]
pygments_style, pygments_dark_style = "friendly", "github-dark"

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
suppress_warnings = ["myst.header"]  # tables.md and others begin where their text begins

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "add_param_group"}
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
default_role = "literal"
add_module_names = False
python_maximum_signature_line_length = 100


def groups() -> dict[str, list[str]]:
    """The public names, by the group in which they are shown."""
    grouped = {name for some in GROUPS.values() for name in some}
    last = list(GROUPS)[-1]
    names = {title: [name for name in some if name in efcp.__all__] for title, some in GROUPS.items()}
    names[last] += [name for name in efcp.__all__ if name not in grouped]
    return {title: some for title, some in names.items() if some}


def write_api(folder: Path = API) -> None:
    """Writes a page for each public name, and a list of all."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    what = "Every public name, from `import efcp`. Arguments of optimizers after `params` and `lr` are keywords only."
    overview = ["# API", "", what]
    for title, names in groups().items():
        overview += ["", f"## {title}", ""]
        for name in names:
            summary = (getattr(efcp, name).__doc__ or "").split("\n\n")[0]
            overview.append(f"- [`{name}`]({name}.md): {' '.join(summary.split())}")
            kind = "autoclass" if isinstance(getattr(efcp, name), type) else "autofunction"
            page = [f"# {name}", "", "```{eval-rst}", ".. currentmodule:: efcp", f".. {kind}:: {name}", "```", ""]
            (folder / f"{name}.md").write_text("\n".join(page), encoding="utf-8")
    overview += ["", "```{toctree}", ":hidden:", "", *(name for names in groups().values() for name in names), "```"]
    (folder / "index.md").write_text("\n".join(overview) + "\n", encoding="utf-8")


def write_scripts(folder: Path = SCRIPTS) -> None:
    """Writes a page for each script in examples/, which shows it, and a list of these pages."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    scripts = sorted((ROOT / "examples").glob("[!_]*.py"))
    listed = [
        "# Scripts of the examples",
        "",
        "```{toctree}",
        ":maxdepth: 1",
        "",
        *(script.stem for script in scripts),
        "```",
        "",
    ]
    (folder / "index.md").write_text("\n".join(listed), encoding="utf-8")
    for script in scripts:
        shown = f"```{{literalinclude}} ../../examples/{script.name}\n:language: python\n```\n"
        (folder / f"{script.stem}.md").write_text(f"# examples/{script.name}\n\n{shown}", encoding="utf-8")


def as_restructured_text(lines: list[str]) -> list[str]:
    """A docstring, which is written in Markdown's manner, in the language that Sphinx reads.

    After a colon, an indented paragraph is a formula, and indented lines `name: text` are a list. A bar stands for a
    magnitude, not for a substitution. Text in single backticks is code.
    """
    result: list[str] = []
    listed = -1  # the indentation of the list that we are in
    before = ""  # the last line with text
    for line in lines:
        indent, blank_before = _indent(line), bool(result) and not result[-1]
        opens = before.endswith(":") and before.strip() not in SECTIONS and indent > _indent(before)
        if line.strip() and indent < listed:
            result.append("")
            listed = -1
        if line.strip() and opens and blank_before:
            result[-2] += ":"
        elif line.strip() and opens:
            if result[-2:-1] and result[-2].strip() == "Returns:":  # what stands before a colon would be a type there
                result[-1] = result[-1][:-1] + "."
            result.append("")
            listed = indent
        parts = re.split(r"(`[^`]*`)", line)
        text = "".join(p if p.startswith("`") else re.sub(r"([|*])", r"\\\1", p) for p in parts)
        if listed == indent and ": " in text:
            text = re.sub(r"^(\s*)([\w, ]+): ", r"\1- **\2**: ", text)
        elif 0 <= listed < indent:
            text = " " * (listed + 2) + text.lstrip()
        result.append(text)
        before = line if line.strip() else before
    return result


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _process_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = as_restructured_text(lines)


def _skip_member(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out what is inherited from `torch.optim.Optimizer` and has no text of ours."""
    return True if not getattr(obj, "__doc__", None) else None


def _add_title(app: Any, docname: str, source: list[str]) -> None:
    """Gives tables of experiments, which are nothing but a table, the name of the experiment as their title."""
    if docname.startswith("analysis/results/"):
        source[0] = f"# Table: {docname.split('/')[2]}\n\n{source[0]}"


def _write_front(app: Any, exception: Exception | None) -> None:
    if exception is None and app.builder.name == "html":
        page = '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">\n'
        (Path(app.outdir) / "index.html").write_text(page, encoding="utf-8")


def setup(app: Any) -> None:
    app.connect("source-read", _add_title)
    app.connect("builder-inited", lambda _: write_api())
    app.connect("builder-inited", lambda _: write_scripts())
    app.connect("autodoc-process-docstring", _process_docstring, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", _skip_member)
    app.connect("build-finished", _write_front)
