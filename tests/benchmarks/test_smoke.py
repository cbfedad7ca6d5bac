"""The benchmark works, on a tiny model; how fast anything is, is not asserted."""

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parents[2] / "benchmarks"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(HERE))
    if name in sys.modules:
        return sys.modules[name]
    return importlib.import_module(name)


@pytest.mark.parametrize("name", ["samestep", "plain:4"])
def test_contenders_do_the_same_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contender = module("contender", monkeypatch)
    work = module("works", monkeypatch).WORKS["smoke"]
    rows = work.write_rows(2)
    assert len(rows.read_text(encoding="utf-8").splitlines()) == 16
    seconds = contender.run(name, work, rows, 2)
    assert len(seconds) == 2
    assert min(seconds) > 0


def run(name: str, tokens: int, seconds: float, peak: float) -> dict[str, Any]:
    return {"name": name, "tokens": tokens, "seconds": [seconds], "peak_bytes": peak, "load": 1.0}


def test_ratios_are_taken_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = module("bars", monkeypatch)
    # The second round met a busy machine: twice as slow for both.
    runs = [run("samestep", 100, 1, 3e9), run("trl:1", 100, 2, 4e9)]
    runs += [run("samestep", 100, 2, 3e9), run("trl:1", 100, 5, 4e9)]
    one, other = bars.summarise(runs)
    assert one["speed_of_samestep"] == 1
    assert other["speed_of_samestep"] == pytest.approx(2.25)
    assert other["spread"] == [2.0, 2.5]
    assert other["memory_of_samestep"] == pytest.approx(0.75)


def test_bars_are_judged_on_the_best_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = module("bars", monkeypatch)
    monkeypatch.setattr(bars, "RESULTS", tmp_path)
    runs = [run("samestep", 100, 1, 3e9), run("trl:1", 100, 3, 4e9), run("trl:8", 100, 1.5, 9e9)]
    runs.append(run("trl-default:8", 100, 4, 5e9))
    bars.save("train-gsm-amd", {"summary": bars.summarise(runs)})
    lines = [bar.line() for bar in bars.all_bars()]
    assert lines[0] == "NOT REACHED   AMD: tokens/s on gsm rows, x TRL's best: 1.5 (bar >= 2.0)"
    assert lines[1].startswith("not measured")
    assert lines[2].startswith("NOT REACHED   AMD: memory on gsm rows, x TRL's default: 0.6")
    tools = [runs[0], run("trl:1", 100, 2.6, 9e9)]
    bars.save("train-tools-amd", {"summary": bars.summarise(tools)})
    assert bars.all_bars()[1].line().startswith("reached ")


def test_the_page_is_what_the_result_files_give(monkeypatch: pytest.MonkeyPatch) -> None:
    module("bars", monkeypatch)
    page = module("page", monkeypatch)
    assert page.PAGE.read_text(encoding="utf-8") == page.page()


def test_roofline_and_growth_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    result = module("roofline", monkeypatch).measure("smoke", 256)
    assert 0 < result["share"] < math.inf
    assert sum(result["profile"].values()) == pytest.approx(1)
    growth = module("growth", monkeypatch)
    figures = growth.point(4, 16, 64, "full")
    assert figures["tokens"] == sum(
        len(m["input_ids"][0]) for m in growth.micro_batches(4, 16, 64, 1024)
    )
    json.dumps(growth.planner(100, 1.0))
    points = [{"tokens": n, "seconds": 2 * n, "peak_bytes": 5 * n} for n in (1, 2, 3)]
    assert growth.straightness(points) == pytest.approx(1)
    assert growth.bytes_of_a_further_token(*points[1:]) == 5
    assert growth.ratio_of_further_tokens(points) == 1
