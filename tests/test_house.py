# SPDX-License-Identifier: Apache-2.0
"""Rules of the house that no compiler checks: who may import whom, and docs that stay true."""

import ast
import doctest
import importlib
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import sparse_attn

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "sparse_attn"

# --- imports point one way ------------------------------------------------------------------------

LAYERS = (
    {"env", "errors", "ops"},
    {"convert", "density", "drawing", "index", "lists", "refine", "selection"},
    {"patterns"},
    {"arguments", "backends", "dispatch", "known_calls", "paged", "attention"},
)
"""Modules or subpackages, lowest first; one may import its own layer and those below it.

What is not named here (integrations, tools, the command line) stands on top: it may import
everything and nothing below may import it. `reference` is apart: it imports nothing.
"""
TOP = len(LAYERS)
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def run_time_nodes(tree: ast.AST):
    """All nodes except what only a type checker sees; imports inside functions do count."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            continue
        yield node
        yield from run_time_nodes(node)


def imported_units(source: str, package: tuple[str, ...]) -> set[str]:
    """First-level modules of sparse_attn that `source`, a module inside `package`, imports."""
    targets = []
    for node in run_time_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            targets += [f"{base}.{alias.name}" for alias in node.names]
    parts = [target.split(".") for target in targets]
    return {p[1] if len(p) > 1 else "sparse_attn" for p in parts if p[0] == "sparse_attn"}


def violations(unit: str, imports: set[str]) -> set[str]:
    if unit == "reference":
        return imports
    rank = RANK.get(unit, TOP)
    return {name for name in imports if rank < RANK.get(name, TOP) and name != unit}


def package_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def test_imports_point_one_way():
    wrong = {}
    for path in package_files():
        inside = path.relative_to(REPO).with_suffix("").parts
        unit = inside[1]
        if unit == "__init__":
            continue
        bad = violations(unit, imported_units(path.read_text(), inside[:-1]))
        if bad:
            wrong[str(path.relative_to(REPO))] = sorted(bad)
    assert not wrong, f"imports against the layers of tests/test_house.py: {wrong}"


@pytest.mark.parametrize(
    ("unit", "source", "bad"),
    [
        ("index", "from sparse_attn.patterns import Pattern", {"patterns"}),
        ("index", "def f():\n    import sparse_attn.attention", {"attention"}),
        ("ops", "from .index import SparseIndex", {"index"}),
        ("ops", "from . import calibrate", {"calibrate"}),
        ("selection", "from sparse_attn import attention", {"attention"}),
        ("reference", "from sparse_attn.index import SparseIndex", {"index"}),
        ("patterns", "import sparse_attn", {"sparse_attn"}),
        ("patterns", "from sparse_attn.selection import top_k_mask\nimport torch", set()),
        ("ops", "if TYPE_CHECKING:\n    from .index import SparseIndex", set()),
        ("integrations", "from sparse_attn.attention import attention", set()),
    ],
)
def test_the_import_check_sees_what_it_should(unit, source, bad):
    assert violations(unit, imported_units(source, ("sparse_attn",))) == bad


def native_files(*folders: str) -> list[Path]:
    suffixes = {".h", ".cpp", ".inl", ".cu", ".cuh"}
    found = (path for folder in folders for path in (REPO / "csrc" / folder).rglob("*"))
    return sorted(path for path in found if path.suffix in suffixes)


@pytest.mark.parametrize(
    ("folder", "forbidden"), [("core", r"torch/|cpu/|cuda/|Python\.h"), ("cpu", r"torch/|cuda/")]
)
def test_native_layers(folder, forbidden):
    files = native_files(folder)
    assert files
    for path in files:
        found = re.findall(rf'#\s*include\s*[<"](?:\.\./)*(?:{forbidden})[^>"]*', path.read_text())
        assert not found, f"{path.relative_to(REPO)} includes {found}"


def test_records_keep_no_folders_of_a_machine():
    files = sorted((REPO / "benchmarks" / "results").rglob("*.json"))
    assert files
    for file in files:
        found = re.search(r"""["'\s=](/\w|~/).*""", file.read_text())
        assert not found, f"{file.name}: {found[0][:100]}"


def test_every_source_file_names_its_licence():
    sources = [*package_files(), *native_files(""), *(REPO / "tests").glob("*.py")]
    for path in sources:
        first = path.read_text().split("\n", 1)[0]
        assert "SPDX-License-Identifier: Apache-2.0" in first, path.relative_to(REPO)


# --- the build says one thing ---------------------------------------------------------------------


def test_one_oldest_torch():
    """The dependency, the build backend and the ABI target name the same torch."""
    sys.path.insert(0, str(REPO / "tools" / "build_backend"))
    try:
        torch_location = importlib.import_module("torch_location")
    finally:
        sys.path.pop(0)
    major, minor = torch_location.MINIMUM
    assert f'"torch>={major}.{minor}"' in (REPO / "pyproject.toml").read_text()
    assert f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}" in (REPO / "CMakeLists.txt").read_text()


# --- documentation that stays true ----------------------------------------------------------------


def readme() -> str:
    return (REPO / "README.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/drop_in.md"])
def test_examples_of_a_page_run(page):
    """The ```python blocks run in order, as one session; ```python no-run is only shown."""
    blocks = re.findall(r"^```python\n(.*?)^```", (REPO / page).read_text(), flags=re.M | re.S)
    assert blocks
    session: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page}, python block {number}", "exec"), session)


def modules() -> list[str]:
    walk = pkgutil.walk_packages(sparse_attn.__path__, "sparse_attn.")
    names = (module.name for module in walk if not module.name.endswith("__main__"))
    return [name for name in names if not name.endswith("_C")]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_run(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"an optional dependency is missing: {error}")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(module, optionflags=flags).failed == 0


def variables_read() -> set[str]:
    """Environment variables that the code names, as string literals of Python or C++."""
    literal = re.compile(r"""["'](SPARSE_ATTN_[A-Z0-9_]+)["']""")
    files = [*package_files(), *native_files("")]
    return {name for path in files for name in literal.findall(path.read_text())}


def test_environment_variables_are_in_the_readme():
    documented = set(re.findall(r"^\| `(SPARSE_ATTN_[A-Z0-9_]+)`", readme(), flags=re.M))
    assert variables_read() == documented
    assert len(documented) < 8
