"""What docs/rollouts.md says of the model that learns to sort is what the result file has."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module("sorting")


def test_the_page_and_the_curve_are_those_of_the_results(benchmark: Any) -> None:
    results = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))
    assert benchmark.write_page(results) == benchmark.PAGE.read_text(encoding="utf-8")
    assert benchmark.picture(results) == benchmark.CURVE.read_text(encoding="utf-8")
    assert all(row["equal"] == row["completions"] > 0 for row in results["splits"])
    assert results["right"]["learned"] > results["right"]["shown"]
    rewards = results["reward"]
    assert sum(rewards[-20:]) > 1.5 * sum(rewards[:20])


def test_the_benchmark_learns_from_its_own_rollouts(benchmark: Any, tmp_path: Path) -> None:
    benchmark.prepare(tmp_path)
    changes = {"model": str(tmp_path / "random"), "steps": 1, "batch_size": 4}
    lines = benchmark.learn(tmp_path, "run", **changes)
    assert len(lines) == 4 * benchmark.POLICY["num_generations"]
    answers = {
        row["prompt"]: row["answer"] for row in benchmark.read_lines(tmp_path / "prompts.jsonl")
    }
    for line in lines:
        text = line["completion"].replace(" ", "")
        assert line["reward"] == (text == answers[line["prompt"]])
