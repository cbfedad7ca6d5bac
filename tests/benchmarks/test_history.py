"""docs/history.md is made from the results, and says of each number what it is."""

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = runpy.run_path(str(ROOT / "benchmarks" / "history" / "page.py"))
RELEASES = runpy.run_path(str(ROOT / "benchmarks" / "history" / "releases.py"))["RELEASES"]


def axis(verdict: str, difference: float | None = None, reason: str = "") -> dict[str, Any]:
    return {"verdict": verdict, "difference": difference, "reason": reason}


def measured(ratio: float = 1.0, **axes: Any) -> dict[str, Any]:
    axes = {
        "micro-batch": axis("exact", 1e-16),
        **{k.replace("_", "-"): v for k, v in axes.items()},
    }
    return {"verdict": axes["micro-batch"]["verdict"], "ratio": ratio, "axes": axes}


def test_the_page_is_of_the_results() -> None:
    results = PAGE["load"]()
    assert results
    assert set(results) <= set(RELEASES)
    assert [one["versions"]["transformers"] for one in results.values()] == list(results)
    assert PAGE["page"](results) == (ROOT / "docs" / "history.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "found", "text"),
    [
        ("micro-batch", measured(), "exact"),
        ("micro-batch", measured(8.0, micro_batch=axis("inexact", 7.0)), "**x 8.000** (7.0e+00)"),
        ("short-window", measured(short_window=axis("inexact", 0.2)), "**2.0e-01**"),
        (
            "short-window",
            measured(short_window=axis("skipped", None, "it ended without an update by its own")),
            "**no step**",
        ),
        (
            "ranks",
            measured(ranks=axis("inexact", 0.1, "7 examples as the sampler deals")),
            "exact *",
        ),
        ("ranks", measured(ranks=axis("inexact", 0.1, "1 micro-batch a rank")), "**1.0e-01**"),
        ("ranks", measured(), ""),
        ("ranks", {"verdict": "not run", "why": "no such model"}, "not run"),
    ],
)
def test_a_cell(name: str, found: dict[str, Any], text: str) -> None:
    assert PAGE["cell"](found, name) == text


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (measured(short_window=axis("exact", 1e-16)), "exact"),
        (measured(short_window=axis("inexact", 0.2)), "**2.0e-01**"),
        (measured(short_window=axis("skipped", None, "without an update")), "exact, no step"),
        ({"verdict": "not run", "why": "exact() needs transformers 4.46 or later"}, "refused"),
        ({"verdict": "not run", "why": "KeyError: 'labels'"}, "not run"),
    ],
)
def test_a_cell_of_a_trainer_made_exact(found: dict[str, Any], text: str) -> None:
    assert PAGE["exact_cell"](found) == text


def test_what_was_not_run_says_why() -> None:
    ways = {"as it is": {"verdict": "not run", "why": "no such class"}}
    results = {"4.44.2": {"versions": {}, "subjects": {"dpo": ways}}}
    assert "- 4.44.2 DPO: no such class" in PAGE["not_run"](results)
    assert PAGE["not_run"]({"4.44.2": {"subjects": {"dpo": {"as it is": measured()}}}}) == ""
