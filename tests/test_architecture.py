"""The rules of the package's structure, read from its source."""

import ast
import itertools
import sys
from pathlib import Path

import pytest

import lightning_lyapunov

FOLDER = Path(lightning_lyapunov.__file__).parent
SOURCES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.py"))}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
LEVELS = [
    {"recurrence", "spectrum", "invariants"},
    {"sharding"},
    {"sequences"},
    {"torch_layers", "custom_layers"},
    {"layers"},
    {"functional"},
    {"metrics", "sampling", "dashboard", "figure", "history", "overhead"},
    {"callback"},
    {"stopping"},
    {"__init__"},
]
each_module = pytest.mark.parametrize("module", TREES)


def imported(module: str) -> set[str]:
    """The dotted names of all modules that a module imports, wherever in its code."""
    names = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}.py imports relatively: write the package's name."
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def siblings(module: str) -> set[str]:
    """The modules of the package that a module imports."""
    prefix = "lightning_lyapunov."
    return {name.removeprefix(prefix).split(".")[0] for name in imported(module) if name.startswith(prefix)} & set(
        TREES
    )


def third_parties(module: str) -> set[str]:
    return {name.split(".")[0] for name in imported(module)} - sys.stdlib_module_names - {"lightning_lyapunov"}


def test_every_module_has_a_level():
    assert set().union(*LEVELS) == set(TREES)
    assert not [path for path in FOLDER.iterdir() if path.is_dir() and path.name != "__pycache__"]


@each_module
def test_imports_go_down(module):
    level = next(i for i, modules in enumerate(LEVELS) if module in modules)
    assert siblings(module) <= set().union(*LEVELS[:level])


@pytest.mark.parametrize("module", sorted(LEVELS[0]))
def test_the_kernel_needs_torch_only(module):
    assert third_parties(module) == {"torch"}


@pytest.mark.parametrize("module", sorted(set(TREES) - {"callback", "stopping"}))
def test_only_the_callbacks_know_of_a_trainer(module):
    assert not third_parties(module) & {"lightning", "pytorch_lightning"}
    assert "trainer" not in SOURCES[module].lower()


def test_no_module_is_a_drawer_for_the_rest():
    assert not set(TREES) & {"utils", "util", "helpers", "common", "misc"}


@each_module
def test_every_module_says_what_it_is_and_what_it_offers(module):
    assert ast.get_docstring(TREES[module])
    assert exported(module)


def exported(module: str) -> list[str]:
    return next(
        ast.literal_eval(node.value)
        for node in TREES[module].body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )


@pytest.mark.parametrize("module", sorted(set(TREES) - {"__init__"}))
def test_every_public_name_is_documented_where_it_is_defined(module):
    body = TREES[module].body
    documented = {node.name for node in body if hasattr(node, "name") and ast.get_docstring(node)}
    for node, after in itertools.pairwise(body):
        if isinstance(node, ast.Assign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            documented.add(ast.unparse(node.targets[0]))
    assert set(exported(module)) <= documented


def test_every_public_name_of_the_package_exists():
    assert all(hasattr(lightning_lyapunov, name) for name in lightning_lyapunov.__all__)


def test_the_package_itself_only_collects_names():
    rest = TREES["__init__"].body[1:]
    assert all(isinstance(node, ast.ImportFrom) or ast.unparse(node).startswith("__all__") for node in rest)
