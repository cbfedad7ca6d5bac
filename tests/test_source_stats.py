"""The counts in docs/design.md and the tree in CONTRIBUTING.md are those of the source."""

import subprocess
from pathlib import Path

import pytest

import source_stats as stats
from source_graph import modules

SOURCE = stats.ROOT / "src"
DESIGN = (stats.ROOT / "docs" / "design.md").read_text(encoding="utf-8")
CONTRIBUTING = (stats.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
HINT = "out of date: run `make docs`"


def test_the_counts_are_those_of_the_tree() -> None:
    assert stats.read_column(DESIGN, "after") == stats.count(SOURCE), HINT


def test_the_counts_before_are_those_of_the_revision() -> None:
    if _git("cat-file", "-e", f"{stats.BEFORE}^{{commit}}"):
        pytest.skip(f"this clone does not hold {stats.BEFORE}")
    assert stats.read_column(DESIGN, "before") == stats.count_revision(stats.BEFORE)


def _git(*arguments: str) -> int:
    done = subprocess.run(["git", *arguments], cwd=stats.ROOT, capture_output=True, check=False)
    return done.returncode


def test_the_aims_hold() -> None:
    counts = stats.count(SOURCE)
    assert float(counts["lines, median file"]) >= 100  # one subject a file, and no dust
    assert int(counts["... outside the cli, lazy entry points and optional packages"]) <= 20
    assert counts["circles of imports"] == "0"


def test_the_tree_is_current() -> None:
    assert stats.between(CONTRIBUTING, "tree") == f"\n```text\n{stats.tree(SOURCE)}\n```\n", HINT


def test_the_pages_about_adding_things_are_listed() -> None:
    pages = stats.adding(stats.ROOT / "docs")
    assert stats.between(CONTRIBUTING, "adding") == f"\n{pages}\n", HINT


def test_every_module_says_what_it_is() -> None:
    silent = [name for name, path in modules(SOURCE).items() if not stats.summary(path)]
    assert silent == []


def test_lazy_entry_points_exist_and_optional_packages_have_an_extra() -> None:
    assert {*stats.LAZY_ENTRY_POINTS, *stats.COMMAND_LINE} <= modules(SOURCE).keys()
    project = (stats.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in stats.OPTIONAL_PACKAGES.values():
        assert f"\n{extra} = [" in project


def test_imports_inside_functions_are_told_apart(tmp_path: Path) -> None:
    late = "def late():\n    {}\n"
    files = {
        "__init__.py": "",
        "cli.py": late.format("import torch"),
        "plain.py": "import json\n" + late.format("import torch"),
        "page.py": late.format("import altair as alt"),
        "charts.py": "import altair as alt\n",
        "report.py": late.format("from samestep.charts import draw"),
        "mixed.py": late.format("import altair, torch"),
        "method.py": "class A:\n    def f(self):\n        if self:\n            import json\n",
    }
    (tmp_path / "samestep").mkdir()
    for name, text in files.items():
        (tmp_path / "samestep" / name).write_text(text, encoding="utf-8")
    found = stats.late_imports(tmp_path)
    counted = [(str(each.path), each.line) for each in found if each.excuse is None]
    assert len(found) == 6
    assert counted == [
        ("samestep/method.py", 4),
        ("samestep/mixed.py", 2),
        ("samestep/plain.py", 3),
    ]


def test_names_of_one_module_are_found(tmp_path: Path) -> None:
    (tmp_path / "samestep").mkdir()
    files = {
        "a.py": "def shared(): ...\ndef alone(): ...\ndef _own(): ...\n",
        "b.py": "from samestep.a import shared\n",
    }
    for name, text in files.items():
        (tmp_path / "samestep" / name).write_text(text, encoding="utf-8")
    assert stats.unshared_names(tmp_path) == ["samestep/a.py:2: alone"]


def test_a_generated_part_is_replaced_and_read_back() -> None:
    page = "a\n<!-- counts: written by tools/source_stats.py -->\nold\n<!-- end of counts -->\nb\n"
    table = stats.table({"files": "3"}, {"files": "5"})
    page = stats.replaced(page, "counts", table)
    assert stats.read_column(page, "before") == {"files": "5"}
    assert stats.read_column(page, "after") == {"files": "3"}
    assert stats.replaced(page, "counts", table) == page
    with pytest.raises(ValueError, match="lacks the markers"):
        stats.replaced(page, "tree", "")
