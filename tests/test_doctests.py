"""The example of every public name runs."""

import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest

import samestep

NAMES = [name for name in samestep.__all__ if name != "__version__"]


FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples(value: Any, name: str) -> list[doctest.DocTest]:
    """The tests in the docstrings of a function, or of a class and its methods."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [test for test in finder.find(value, name, globs={}) if test.examples]


def run(test: doctest.DocTest) -> str:
    """What a test has to complain about; empty if it holds. It starts with no name defined."""
    lines: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=lines.append)
    return "".join(lines)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    value = getattr(samestep, name)
    assert ">>> " in (inspect.getdoc(value) or ""), f"the docstring of {name} has no example"
    complaints = [run(test) for test in examples(value, name)]
    assert not any(complaints), "".join(complaints)


def test_the_tests_see_a_wrong_example_and_a_name_that_is_not_imported() -> None:
    def wrong() -> None:
        """Add.

        >>> 1 + 1
        3
        """

    def unimported() -> None:
        """Use a name.

        >>> samestep.step
        """

    (first,), (second,) = examples(wrong, "wrong"), examples(unimported, "unimported")
    assert "Expected:\n    3\nGot:\n    2" in run(first)
    assert "NameError" in run(second)
