"""Which module imports which, read from the source: nothing of the package is imported."""

import ast
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = "samestep"


@dataclass(frozen=True)
class Import:
    """One imported module.

    Attributes:
        module: Its dotted name.
        line: Where the statement stands.
        in_function: Whether it runs only when a function is called.
        for_types: Whether it stands under ``if TYPE_CHECKING``, so never runs.
    """

    module: str
    line: int
    in_function: bool
    for_types: bool


def modules(source: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name.

    Args:
        source: The folder that holds the package's folder.
    """
    found = {}
    for path in sorted((source / PACKAGE).rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: Collection[str] = ()) -> list[Import]:
    """What a file imports.

    Args:
        path: The file.
        known: Dotted names of modules, by which ``from package import module`` is told from
            ``from module import name``.
    """
    found = []
    for node, in_function, for_types in import_statements(path.read_text(encoding="utf-8")):
        names = imported_modules(node, known)
        found += [Import(name, node.lineno, in_function, for_types) for name in sorted(names)]
    return found


def imported_modules(node: ast.Import | ast.ImportFrom, known: Collection[str]) -> set[str]:
    """The dotted names of the modules that a statement imports.

    Args:
        node: The statement.
        known: As for `imports`.
    """
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    full = {f"{node.module}.{alias.name}" for alias in node.names}
    return {name if name in known else node.module or "" for name in full}


@cache
def import_statements(text: str) -> list[tuple[ast.Import | ast.ImportFrom, bool, bool]]:
    """The import statements of a file: whether they run in a function, whether for types alone."""
    return [
        (node, in_function, for_types)
        for node, in_function, for_types in _walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]


def _walk(
    node: ast.AST, *, in_function: bool = False, for_types: bool = False
) -> Iterator[tuple[ast.AST, bool, bool]]:
    """Every node below a node, in reading order, with where it stands."""
    for child in ast.iter_child_nodes(node):
        yield child, in_function, for_types
        inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for statement in child.body:
                yield statement, inside, True
                yield from _walk(statement, in_function=inside, for_types=True)
            for statement in child.orelse:
                yield statement, inside, for_types
                yield from _walk(statement, in_function=inside, for_types=for_types)
        else:
            yield from _walk(child, in_function=inside, for_types=for_types)


def import_graph(source: Path, *, at_import_only: bool = False) -> dict[str, set[str]]:
    """Which module of the package imports which.

    Args:
        source: The folder that holds the package's folder.
        at_import_only: Leave out what only a called function or a type checker imports.

    Returns:
        The imported modules of the package by the importing one.
    """
    known = modules(source)
    return {
        name: {
            each.module
            for each in imports(path, known)
            if not (at_import_only and (each.in_function or each.for_types))
        }
        & known.keys() - {name}
        for name, path in known.items()
    }


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """Every node that a path from ``start`` leads to; ``start`` itself only on a circle."""
    seen: set[str] = set()
    waiting = list(graph.get(start, ()))
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += graph.get(node, ())
    return seen


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other, each sorted; empty if there is no circle."""
    reach = {node: reachable(graph, node) for node in graph}
    groups = {
        tuple(sorted(other for other in reach[node] if node in reach.get(other, ())))
        for node in graph
        if node in reach[node]
    }
    return [list(group) for group in sorted(groups)]


def package_of(module: str, packages: Collection[str]) -> str:
    """The innermost package that a module lies in; a module at the root stands for itself.

    Args:
        module: A dotted name.
        packages: The dotted names of all packages.
    """
    if module == PACKAGE or module in packages:
        return module
    parent = module.rpartition(".")[0]
    return module if parent == PACKAGE else parent


def package_graph(source: Path) -> dict[str, set[str]]:
    """Which package, or module at the root, imports from which; nested ones by themselves."""
    known = modules(source)
    packages = {name for name, path in known.items() if path.name == "__init__.py"}
    graph: dict[str, set[str]] = {}
    for module, imported in import_graph(source).items():
        home = package_of(module, packages)
        graph.setdefault(home, set()).update(package_of(name, packages) for name in imported)
        graph[home].discard(home)
    return graph


def outermost_graph(source: Path) -> dict[str, set[str]]:
    """The graph of packages with each nested one as a part of the package that holds it."""
    graph: dict[str, set[str]] = {}
    for package, imported in package_graph(source).items():
        home = _outer(package)
        graph.setdefault(home, set()).update(map(_outer, imported))
        graph[home].discard(home)
    return graph


def _outer(package: str) -> str:
    return ".".join(package.split(".")[:2])
