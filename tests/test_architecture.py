"""The rules of the package's structure, read from its source."""

import ast
import itertools
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lightning_lyapunov

FOLDER = Path(lightning_lyapunov.__file__).parent
PACKAGE = "lightning_lyapunov"


def dotted(path: Path) -> str:
    """Return a module's path in the package: ``kernel.propagation``; of a folder's ``__init__`` that of the folder."""
    parts = path.relative_to(FOLDER).with_suffix("").parts
    return ".".join(parts if parts == ("__init__",) or parts[-1] != "__init__" else parts[:-1])


PATHS = {dotted(path): path for path in sorted(FOLDER.rglob("*.py"))}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in PATHS.items()}
FOLDERS = {module for module, path in PATHS.items() if path.name == "__init__.py"} - {"__init__"}
MODULES = sorted(set(TREES) - FOLDERS)
# From top to bottom, by the first part of the path. A module imports from the floors below its own.
FLOORS = [
    {"__init__"},
    {"callbacks"},
    {"measuring"},
    {"reporting", "metrics", "moments", "functional", "equilibria", "covariant", "initialisation", "confidence"},
    {"recording"},
    {"layers"},
    {"kernel", "invariants", "units"},
]
# Imported by others of their own floor, of which they import nothing themselves.
LEAVES = {"confidence", "functional", "moments"}
MAX_MODULE_LINES, MAX_CLASS_LINES = 430, 260

each_module = pytest.mark.parametrize("module", MODULES)
each_tree = pytest.mark.parametrize("module", TREES)


def imported(module: str) -> set[str]:
    """Return the dotted names of all modules that a module imports, wherever in its code."""
    names = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively: write the package's name."
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def siblings(module: str) -> set[str]:
    """Return the modules of the package that a module imports."""
    return {name.removeprefix(f"{PACKAGE}.") for name in imported(module)} & set(TREES)


def third_parties(module: str) -> set[str]:
    return {name.split(".")[0] for name in imported(module)} - sys.stdlib_module_names - {PACKAGE}


def part(module: str) -> str:
    return module.split(".")[0]


def floor(module: str) -> int:
    return next(number for number, parts in enumerate(FLOORS) if part(module) in parts)


def names_in_code(module: str) -> set[str]:
    """Return the names of variables, arguments, attributes, functions and classes."""
    nodes = list(ast.walk(TREES[module]))
    return {
        getattr(node, field)
        for node in nodes
        for field in ("id", "arg", "attr", "name")
        if isinstance(getattr(node, field, None), str)
    }


def test_every_module_has_a_floor():
    assert set().union(*FLOORS) == {part(module) for module in TREES}


def test_every_folder_is_a_package():
    inner = {path.parent for path in PATHS.values()}
    assert all((folder / "__init__.py").exists() for folder in inner)


@each_tree
def test_imports_go_down(module):
    for other in siblings(module):
        if floor(other) == floor(module):
            assert part(other) == part(module) or other in LEAVES, f"{module} imports {other} of its own floor"
            assert module not in LEAVES, f"{module} imports {other} of its own floor"
        else:
            assert floor(other) > floor(module), f"{module} imports {other} of a floor above"


def test_no_imports_go_round_in_a_circle():
    assert list(TopologicalSorter({module: siblings(module) for module in TREES}).static_order())


@pytest.mark.parametrize("module", [module for module in TREES if part(module) == "kernel"])
def test_the_kernel_needs_torch_only(module):
    assert third_parties(module) <= {"torch"}
    assert all(part(other) == "kernel" for other in siblings(module))


@pytest.mark.parametrize("module", [module for module in TREES if part(module) != "callbacks"])
def test_only_the_callbacks_know_of_a_trainer(module):
    assert not third_parties(module) & {"lightning", "pytorch_lightning"}
    assert not [name for name in names_in_code(module) if "trainer" in name.lower()]


def test_no_module_is_a_drawer_for_the_rest():
    names = {name for module in TREES for name in module.split(".")}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


@each_tree
def test_no_module_and_no_class_is_too_long(module):
    assert len(PATHS[module].read_text(encoding="utf-8").splitlines()) <= MAX_MODULE_LINES
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno + 1 <= MAX_CLASS_LINES, node.name


@each_module
def test_every_module_says_what_it_is_and_what_it_offers(module):
    assert ast.get_docstring(TREES[module])
    assert exported(module)


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_folder_says_what_is_in_it_and_nothing_else(folder):
    assert ast.get_docstring(TREES[folder])
    assert len(TREES[folder].body) == 1


def exported(module: str) -> list[str]:
    return next(
        ast.literal_eval(node.value)
        for node in TREES[module].body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__init__"}))
def test_every_public_name_is_documented_where_it_is_defined(module):
    body = TREES[module].body
    documented = {node.name for node in body if hasattr(node, "name") and ast.get_docstring(node)}
    for node, after in itertools.pairwise(body):
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            documented |= {ast.unparse(target)} if isinstance(after.value, ast.Constant) else set()
    assert set(exported(module)) <= documented


def test_every_public_name_of_the_package_exists():
    assert all(hasattr(lightning_lyapunov, name) for name in lightning_lyapunov.__all__)


def test_the_package_itself_only_collects_names():
    rest = TREES["__init__"].body[1:]
    assert all(
        isinstance(node, ast.ImportFrom) or ast.unparse(node).startswith(("__all__", "__version__")) for node in rest
    )


COLLECTIVES = {
    "reduce",
    "broadcast",
    "reduce_boolean_decision",
    "full_tensor",
    "compute",
    "barrier",
    "all_gather",
    "all_reduce",
}


def test_all_that_ranks_do_together_is_listed_in_one_place():
    calls = {
        (module, node.attr)
        for module in TREES
        if part(module) in ("callbacks", "measuring", "layers", "recording", "kernel", "reporting")
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES
    }
    assert calls == {
        ("callbacks.measurement", "reduce"),
        ("measuring.summaries", "compute"),
        ("callbacks.run", "broadcast"),
        ("callbacks.flossing", "broadcast"),
        ("callbacks.stopping", "reduce_boolean_decision"),
        ("layers.sharding", "full_tensor"),
    }
    users = {module for module in TREES if "full_tensor" in names_in_code(module)}
    assert users == {"layers.sharding", "layers.custom", "recording.calls"}
    listed = ast.get_docstring(TREES["callbacks.ranks"])
    names = (
        "reduce``",
        "compute",
        "broadcast",
        "reduce_boolean_decision",
        "full_tensor",
        "gathered",
        "custom",
        "recorder",
    )
    assert all(name in listed for name in names)
