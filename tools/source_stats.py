"""Counts what the package is made of, and draws its tree, from the source alone.

    source_stats.py                 print the table of counts of the working tree
    source_stats.py --before REV    print it beside that of a revision
    source_stats.py --late          list the imports inside functions, each with its reason
    source_stats.py --unshared      list names that only their own module uses
    source_stats.py --tree          print the tree with a comment a file
    source_stats.py --write         write counts and tree into docs/design.md and CONTRIBUTING.md

Nothing of samestep is imported, so that it works on any revision.
"""

import argparse
import ast
import io
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from source_graph import (
    PACKAGE,
    Import,
    circles,
    import_graph,
    import_statements,
    imported_modules,
    imports,
    modules,
    outermost_graph,
    package_graph,
)

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "286be5e"
"""The commit before the packages were redrawn: the "before" column of docs/design.md."""

COMMAND_LINE = ("samestep.cli", "samestep.__main__")

LAZY_ENTRY_POINTS = {
    "samestep": "public names load PyTorch when they are first used",
    "samestep.audit.command": "`samestep check --help` needs no PyTorch",
    "samestep.audit.pytest_plugin": "pytest loads it in every project where samestep is installed",
    "samestep.doctor.command": "`samestep doctor --help` needs no PyTorch",
    "samestep.doctor.worker": "what libraries print as they are loaded is kept from its results",
    "samestep.study.command": "`samestep study --help` needs no PyTorch",
    "samestep.train.after_command": "`samestep generate --help` needs no PyTorch",
    "samestep.train.verify_command": "`samestep verify --help` needs no PyTorch",
    "samestep.train.command": "`samestep train --help` needs no PyTorch",
}
"""Modules whose task is to be cheap to import and to load the heavy part once it is wanted."""

OPTIONAL_PACKAGES = {
    "PIL": "vision",
    "accelerate": "dev",
    "altair": "report",
    "datasets": "train",
    "diffusers": "diffusion",
    "fsspec": "train",
    "jinja2": "report",
    "lightning": "dev",
    "markupsafe": "report",
    "peft": "train",
    "tensorboard": "track",
    "torch.utils.tensorboard": "track",
    "tokenizers": "train",
    "trackio": "track",
    "transformers": "train",
    "vl_convert": "report",
    "wandb": "track",
}
"""Packages that only an extra of pyproject.toml installs, and which extra."""


@dataclass(frozen=True)
class LateImport:
    """An import statement inside a function.

    Attributes:
        path: The file.
        line: Where the statement stands.
        statement: Its text.
        excuse: Why it may stand there: the command line, a lazy entry point, an optional
            package; None if it is counted against the aim.
    """

    path: Path
    line: int
    statement: str
    excuse: str | None


def late_imports(source: Path) -> list[LateImport]:
    """The import statements inside functions, in the order of the files."""
    known = modules(source)
    return [
        LateImport(
            path=path.relative_to(source),
            line=node.lineno,
            statement=ast.unparse(node),
            excuse=_excuse(module, imported=imported_modules(node, known), known=known),
        )
        for module, path in known.items()
        for node, in_function, _ in import_statements(path.read_text(encoding="utf-8"))
        if in_function
    ]


def _excuse(module: str, *, imported: set[str], known: Mapping[str, Path]) -> str | None:
    """Why a module may import these inside a function; None if that is counted."""
    if module in COMMAND_LINE:
        return "command line"
    if module in LAZY_ENTRY_POINTS:
        return f"lazy entry point: {LAZY_ENTRY_POINTS[module]}"
    optional = {_optional_package(name, known) for name in imported}
    if None in optional:
        return None
    needed = sorted(package for package in optional if package)
    return f"optional: {', '.join(f'{p} (extra {OPTIONAL_PACKAGES[p]})' for p in needed)}"


def _optional_package(name: str, known: Mapping[str, Path]) -> str | None:
    """The optional package that a module is of, or that it needs at once to be imported."""
    names = [name]
    if name in known:
        names = [each.module for each in imports(known[name], known) if _runs(each)]
    for package in OPTIONAL_PACKAGES:
        if any(f"{each}.".startswith(f"{package}.") for each in names):
            return package
    return None


def _runs(each: Import) -> bool:
    return not each.in_function and not each.for_types


def unshared_names(source: Path) -> list[str]:
    """Functions and classes without an underscore that no other module of the package names.

    They are either for users (then documentation names them) or should have an underscore.

    Args:
        source: The folder that holds the package's folder.
    """
    texts = {path: path.read_text(encoding="utf-8") for path in modules(source).values()}
    words = {path: set(re.findall(r"\w+", text)) for path, text in texts.items()}
    return [
        f"{path.relative_to(source)}:{node.lineno}: {node.name}"
        for path, text in texts.items()
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not any(node.name in found for other, found in words.items() if other != path)
    ]


def count(source: Path) -> dict[str, str]:
    """The counts of a tree, as text by what is counted.

    Args:
        source: The folder that holds the package's folder.
    """
    lines = {
        path: len(path.read_text(encoding="utf-8").splitlines())
        for path in modules(source).values()
    }
    largest = max(lines, key=lambda path: (lines[path], str(path)))
    late = late_imports(source)
    packages = package_graph(source)
    return {
        "source files": str(len(lines)),
        "lines, median file": f"{statistics.median(lines.values()):g}",
        "lines, largest file": f"{lines[largest]} ({largest.relative_to(source / PACKAGE)})",
        "imports inside functions": str(len(late)),
        "... outside the cli, lazy entry points and optional packages": str(
            sum(each.excuse is None for each in late)
        ),
        "packages and modules at the root": str(len(packages)),
        "import edges between those": str(sum(map(len, packages.values()))),
        "import edges between modules": str(sum(map(len, import_graph(source).values()))),
        "circles of imports": str(len(circles(import_graph(source, at_import_only=True)))),
        "... with imports inside functions": str(len(circles(import_graph(source)))),
        "... between packages, each with those inside it": str(
            len(circles(outermost_graph(source)))
        ),
    }


def count_revision(revision: str) -> dict[str, str]:
    """The counts of a git revision.

    Args:
        revision: Anything that git names a commit by.

    Raises:
        subprocess.CalledProcessError: The repository does not hold it, as in a shallow clone.
    """
    done = subprocess.run(
        ["git", "archive", revision, "src"], cwd=ROOT, capture_output=True, check=True
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        tarfile.open(fileobj=io.BytesIO(done.stdout)) as t,
    ):
        t.extractall(folder, filter="data")
        return count(Path(folder) / "src")


def table(after: Mapping[str, str], before: Mapping[str, str] | None = None) -> str:
    """Counts as a table in Markdown; with two columns where there is a "before"."""
    if before is None:
        head, rows = "| what | now |\n| --- | --- |", [f"| {k} | {v} |" for k, v in after.items()]
    else:
        head = "| what | before | after |\n| --- | --- | --- |"
        rows = [f"| {what} | {before[what]} | {after[what]} |" for what in after]
    return "\n".join([head, *rows])


def read_column(text: str, column: str) -> dict[str, str]:
    """A column of the table in a page of Markdown, by what is counted."""
    head, _, *rows = between(text, "counts").strip().splitlines()
    at = _cells(head).index(column)
    return {_cells(row)[0]: _cells(row)[at] for row in rows}


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("| ").split("|")]


def tree(source: Path) -> str:
    """The files of the package, each with the first line of its docstring."""
    known = modules(source)
    rows: list[tuple[str, str]] = [(f"src/{PACKAGE}/", summary(known[PACKAGE]))]
    _add_rows(rows, source / PACKAGE, depth=1)
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{comment}".rstrip() for name, comment in rows)


def _add_rows(rows: list[tuple[str, str]], folder: Path, *, depth: int) -> None:
    indent = "  " * depth
    files = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    rows += [(f"{indent}{path.name}", summary(path)) for path in files]
    for package in sorted(folder.iterdir()):
        if (package / "__init__.py").exists():
            rows.append((f"{indent}{package.name}/", summary(package / "__init__.py")))
            _add_rows(rows, package, depth=depth + 1)


def adding(docs: Path) -> str:
    """A list of links to the pages "Adding a ..."."""
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(docs.glob("adding-*.md"))}
    titles = {path: text.partition("\n")[0].lstrip("# ") for path, text in pages.items()}
    return "\n".join(f"- [{title}](docs/{path.name})" for path, title in titles.items())


def summary(path: Path) -> str:
    """The first line of a module's docstring, without its full stop; empty if it has none."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].removesuffix(".")


def between(text: str, name: str) -> str:
    """What a page holds between the markers of a generated part.

    Raises:
        ValueError: The page does not hold both markers.
    """
    return text[slice(*_span(text, name))]


def replaced(text: str, name: str, new: str) -> str:
    """The page with another content between the markers.

    Raises:
        ValueError: The page does not hold both markers.
    """
    start, end = _span(text, name)
    return f"{text[:start]}\n{new}\n{text[end:]}"


def _span(text: str, name: str) -> tuple[int, int]:
    opening, closing = (
        f"<!-- {name}: written by tools/source_stats.py -->",
        f"<!-- end of {name} -->",
    )
    if opening not in text or closing not in text:
        raise ValueError(f"the page lacks the markers {opening} and {closing}")
    return text.index(opening) + len(opening), text.index(closing)


def write(before: Mapping[str, str] | None = None) -> None:
    """Bring docs/design.md and CONTRIBUTING.md up to date with the working tree.

    Args:
        before: The "before" column; None: the one that is there stays.
    """
    source = ROOT / "src"
    design, contributing = ROOT / "docs" / "design.md", ROOT / "CONTRIBUTING.md"
    text = design.read_text(encoding="utf-8")
    text = replaced(text, "counts", table(count(source), before or read_column(text, "before")))
    design.write_text(text, encoding="utf-8")
    text = contributing.read_text(encoding="utf-8")
    text = replaced(text, "tree", f"```text\n{tree(source)}\n```")
    text = replaced(text, "adding", adding(ROOT / "docs"))
    contributing.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Counts and tree of the package.")
    parser.add_argument("--before", metavar="REV", help="a revision to stand beside the tree")
    parser.add_argument("--late", action="store_true", help="list the imports inside functions")
    parser.add_argument("--unshared", action="store_true", help="list names of one module's use")
    parser.add_argument("--tree", action="store_true", help="print the tree")
    parser.add_argument("--write", action="store_true", help="write table and tree into the docs")
    options = parser.parse_args(arguments)
    source = ROOT / "src"
    before = count_revision(options.before) if options.before else None
    if options.write:
        write(before)
    elif options.tree:
        print(tree(source))
    elif options.unshared:
        print("\n".join(unshared_names(source)))
    elif options.late:
        for each in late_imports(source):
            print(f"{each.path}:{each.line}: {each.statement}  # {each.excuse or 'counted'}")
    else:
        print(table(count(source), before))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
