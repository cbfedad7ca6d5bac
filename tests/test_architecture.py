"""Which module may import which, read from the source."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
PACKAGES: dict[str, set[str]] = {
    "errors": set(),
    "utils": {"errors"},
    "kernels": {"errors", "utils"},
    "engine": {"errors", "utils"},
    "losses": {"engine", "errors", "kernels", "utils"},
    "data": {"engine", "errors", "utils"},
    "models": {"data", "engine", "errors", "kernels", "losses", "utils"},
    "objectives": {"data", "engine", "errors", "losses", "models", "utils"},
    "audit": {"engine", "errors", "utils"},
    "train": {
        *("data", "engine", "errors", "kernels", "losses", "models", "objectives", "utils"),
    },
    "study": {"data", "engine", "errors", "models", "train", "utils"},
    "cli": {"audit", "errors", "study", "train", "utils"},
    "__main__": {"cli"},
}
"""What each package, or module at the root, may import of samestep beside itself."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: set[str], *, everywhere: bool = True) -> set[str]:
    """The modules of samestep that a file imports; those at its top alone, if so asked."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in whole}
    return found & known


def graph(*, everywhere: bool = True) -> dict[str, set[str]]:
    known = modules()
    return {
        name: imports(path, set(known), everywhere=everywhere) - {name}
        for name, path in known.items()
    }


def part(module: str) -> str:
    """The package, or the module at the root, that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def test_there_are_no_cycles() -> None:
    try:
        tuple(TopologicalSorter(graph(everywhere=False)).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(("name", "allowed"), sorted(PACKAGES.items()))
def test_layers(name: str, allowed: set[str]) -> None:
    for module, imported in graph().items():
        if part(module) == name:
            parts = {part(other) for other in imported} - {name, "samestep"}
            assert parts <= allowed, f"{module} imports {sorted(parts - allowed)}"


def test_every_package_has_its_place() -> None:
    assert {part(module) for module in modules()} - {"samestep"} == set(PACKAGES)


def test_nothing_imports_the_command_line() -> None:
    users = [name for name, imported in graph().items() if "samestep.cli" in imported]
    assert users == ["samestep.__main__"]


def test_the_test_sees_a_forbidden_import(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def late():\n    from samestep.train import trainer\n", encoding="utf-8")
    assert imports(bad, set(modules())) == {"samestep.train.trainer"}
    assert imports(bad, set(modules()), everywhere=False) == set()
