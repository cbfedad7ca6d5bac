"""The tables of docs/bitwise.md are those of the result file, and the file says what it should."""

import importlib
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module("bitwise")


def test_the_page_is_that_of_the_results(benchmark: Any) -> None:
    results = benchmark.json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))
    assert benchmark.write_page(results) == benchmark.PAGE.read_text(encoding="utf-8")
    drawn = sum(row["drawn"] for row in results["draws"])
    assert drawn >= 500
    assert drawn == sum(row["equal"] for row in results["draws"])
    assert all(row["equal"] for row in (*results["kills"], *results["objectives"]))
    assert all(row["shown"] for row in results["mutants"])


def test_the_benchmark_draws_and_measures(benchmark: Any) -> None:
    rows = benchmark.drawn(2, benchmark.random.Random(0))
    assert sum(row["equal"] for row in rows) == 2
    assert benchmark.rounding(2)["grid"] < 1e-6
