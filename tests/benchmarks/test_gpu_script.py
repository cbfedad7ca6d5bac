"""The script for a GPU works without one: it goes on past parts that fail, and tells results."""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from samestep.train import trainer
from samestep.train.settings.base import TrainSettings

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """What a part has told the script, line by line."""
    lines = capsys.readouterr().out.splitlines()
    return [json.loads(line) for line in lines if line.startswith('{"')]


SO_FAR = "import time; print('{\"a\": 1}', flush=True); "
LEAVES = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; {}']); "


def test_a_part_that_fails_hangs_or_says_nothing_is_noted_and_the_next_begins(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load("gpu_run")
    sleeps = LEAVES.format("time.sleep(60)")
    found = [
        script.Part("fails", ("-c", "raise SystemExit('no memory')"), 20),
        script.Part("hangs", ("-c", SO_FAR + "time.sleep(60)"), 1.5),
        script.Part("leaves one that hangs", ("-c", SO_FAR + sleeps), 20),
        script.Part("hangs with another", ("-c", sleeps + "import time; time.sleep(60)"), 1.5),
        script.Part("silent", ("-c", "print('hello')"), 20),
        script.Part("counts", ("-c", SO_FAR + "print('{\"a\": 2}')"), 20),
        script.Part("cut off", ("-c", SO_FAR + "print('{\"a')"), 20),
        script.Part("tests", ("-c", "print('== 3 passed ==')"), 20, figures=False),
        script.Part("red", ("-c", "print('FAILED x'); raise SystemExit(1)"), 20, figures=False),
        script.Part("needs", ("-c", "print('{\"a\": 2}')"), 20, needs="no_such_module"),
    ]
    monkeypatch.setattr(script, "parts", lambda device, *, tiny: found)
    out = tmp_path / "gpu.json"
    arguments = ["gpu_run.py", "--device", "cpu", "--out", str(out), "--minutes", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    began = time.monotonic()
    assert script.main() == 0
    assert time.monotonic() - began < 40  # of three that would last for a minute
    parts = json.loads(out.read_text(encoding="utf-8"))["parts"]
    by_name = {part["name"]: part for part in parts}
    assert by_name["fails"]["error"] == "exit code 1: no memory"
    assert by_name["hangs"]["error"] == "ended after 2 s"
    assert by_name["hangs"]["figures"] == {"a": 1}
    assert by_name["leaves one that hangs"]["figures"] == {"a": 1}
    assert "error" not in by_name["leaves one that hangs"]
    assert by_name["hangs with another"]["error"] == "ended after 2 s"
    assert by_name["silent"]["error"] == "exit code 0: hello"
    assert by_name["counts"]["figures"] == {"a": 2}
    assert by_name["cut off"]["figures"] == {"a": 1}
    assert by_name["tests"]["figures"] == {"told": "3 passed"}
    assert by_name["red"]["failed"] == ["FAILED x"]
    assert by_name["needs"]["error"] == "left out: no_such_module is not installed"


def test_figures_are_in_the_file_while_their_part_runs(load: Any, tmp_path: Path) -> None:
    """And what a part writes to disk goes with it."""
    script = load("gpu_run")
    out, told = tmp_path / "gpu.json", []
    report = script.Report({"device": "cpu"}, out)

    def tell(now: dict[str, Any]) -> None:
        report.write(now)
        told.append(json.loads(out.read_text(encoding="utf-8"))["parts"])

    writes = "import tempfile; print('{\"a\": \"' + tempfile.mkdtemp() + '\"}', flush=True); "
    part = script.Part("killed", ("-c", writes + "import time; time.sleep(60)"), 2)
    report.add(script.run_part(part, 2, tell))
    assert [part["figures"].keys() for part in told[0]] == [{"a"}]
    (kept,) = json.loads(out.read_text(encoding="utf-8"))["parts"]
    assert "error" in kept
    assert not os.path.exists(kept["figures"]["a"])


def test_every_part_names_a_script_that_exists(load: Any) -> None:
    script = load("gpu_run")
    for part in [*script.parts("cuda", tiny=False), *script.parts("cpu", tiny=True)]:
        named = [each for each in part.command if each.endswith((".py", "tests/gpu"))]
        assert named
        assert all(Path(each).exists() for each in named), part


def test_parts_come_by_their_worth_and_name_every_peer(load: Any) -> None:
    found = load("gpu_parts").parts("cuda", tiny=False)
    names = [part.name for part in found]
    assert names[:5] == [
        "tests",
        "llama-1b-gsm samestep:layers",
        "llama-1b-gsm samestep",
        "exactness smollm2-135m",
        "llama-1b-gsm trl-best:128",
    ]
    assert len(set(names)) == len(names)
    assert sum(part.seconds for part in found[:5]) < 600  # at their limits, which is never
    contender, works = load("gpu_contender"), load("gpu_works")
    run = [name.split(" ")[1].partition(":")[0] for name in names if " " in name]
    assert {*contender.TRL, "trl-best", "plain", "samestep"} <= set(run)
    for work in set(works.WORKS) - {"tiny"}:
        assert {f"{work} samestep", f"{work} samestep:layers"} <= set(names)
        assert any(name.startswith(f"{work} trl-best:") for name in names)
    unneeded = [part.name for part in found if part.needs and "liger" not in part.name]
    assert not unneeded
    assert all(part.needs == "liger_kernel" for part in found if "trl-liger" in part.name)
    quick, compiling = (part.command[-1] for part in found if part.name.startswith("tests"))
    assert (quick, compiling) == ("gpu and not slow", "gpu and slow")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["samestep", "samestep:none", "plain:4"])
def test_a_contender_trains_a_tiny_model(
    name: str, load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    contender = load("gpu_contender")
    options = ["--work", "tiny", "--device", "cpu", "--steps", "4"]
    monkeypatch.setattr(sys, "argv", ["gpu_contender.py", name, *options])
    contender.main()
    *during, before_limit, last = lines_of(capsys)
    assert [len(line["seconds"]) for line in during] == [3, 4]
    works = load("gpu_works")
    tokens = sum(len(row["input_ids"]) for row in works.rows_of(works.WORKS["tiny"], 4))
    assert sum(last["tokens"]) == tokens
    assert last["tokens_per_second"] == sum(last["tokens"][2:]) / sum(last["seconds"][2:])
    assert 0 < last["flops_per_second"]["executed"] < last["flops_per_second"]["model"]
    assert before_limit["outside_steps"] > 0
    assert last["limit_flops_per_second"] > 0
    assert last["peak_bytes"] > 0


@pytest.mark.parametrize(
    ("name", "compiling", "steps"),
    [("samestep", "auto", 20_000), ("samestep:layers", "layers", 7), ("samestep:none", "none", 7)],
)
def test_only_a_long_run_chooses_compiled_layers_by_itself(
    name: str, compiling: str, steps: int, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven steps are too short to earn back compiling, so they would show what none shows."""
    seen: list[TrainSettings] = []
    monkeypatch.setattr(trainer, "train", lambda settings, callbacks: seen.append(settings))
    contender, works = load("gpu_contender"), load("gpu_works")
    contender.run(name, works.WORKS["tiny"], steps=7, device="cpu")
    assert (seen[0].compile, seen[0].steps) == (compiling, steps)


@pytest.mark.slow
@pytest.mark.thorough
def test_exactness_is_measured_on_a_tiny_model(
    load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exactness = load("gpu_exactness")
    precisions = ["float64", "mixed"]  # the others take as long again
    options = ["--shape", "tiny", "--device", "cpu", "--precisions", *precisions]
    monkeypatch.setattr(sys, "argv", ["gpu_exactness.py", *options])
    exactness.main()
    lines = lines_of(capsys)
    assert list(lines[0]) == ["float64", "bars"]
    assert list(lines[-1]) == ["float64", "mixed", "losses", "bars"]
    found = lines[-1]
    assert found["float64"]["to_float64"] < 1e-12
    for precision in precisions:
        apart = found[precision]["between_splits"]
        assert len(apart) == 5
        assert max(apart.values()) <= max(found[precision]["to_float64"], 1e-12)
    falls = found["losses"]["float32"]
    assert falls == sorted(falls, reverse=True)
    assert len(falls) == 4
    assert [bar["holds"] for bar in found["bars"].values()] == [True, True]


def test_bars_of_exactness_can_fail(load: Any) -> None:
    bars = load("gpu_exactness").bars
    mixed = {"between_splits": {"a": 0.0, "b": 3e-3}, "to_float64": 2e-3}
    found = bars({"mixed": mixed, "losses": {"apart": 0.02}})
    assert [bar["holds"] for bar in found.values()] == [False, False]
    assert bars({"mixed": {"error": "x"}, "losses": {"error": "y"}}) == {}


@pytest.mark.parametrize("liger", [True, False])
def test_the_best_of_trl_is_what_runs(
    liger: bool, load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    contender, works = load("gpu_contender"), load("gpu_works")
    tried: list[tuple[int, bool]] = []

    def run_trl(
        work: Any, rows: int, steps: int, device: str, options: dict[str, Any], figures: Any
    ) -> None:
        tried.append((rows, "use_liger_kernel" in options))
        figures.step(seconds=9.0, tokens=1, loss=1.0)
        if rows > 4:
            raise torch.OutOfMemoryError("full")
        for _ in range(2):
            figures.step(seconds=1.0, tokens=100, loss=1.0)

    monkeypatch.setattr(contender, "run_trl", run_trl)
    monkeypatch.setattr(contender, "has_liger", lambda: liger)
    contender.run("trl-best:16", works.WORKS["tiny"], steps=3, device="cpu")
    assert tried == [*([(16, True)] if liger else []), (16, False), (8, False), (4, False)]
    last = lines_of(capsys)[-1]
    assert last["ran"] == "trl:4"
    assert list(last["passed_over"]) == ["trl-liger:16", "trl:16", "trl:8"]
    assert last["seconds"] == [9.0, 1.0, 1.0]  # those of what was passed over are gone
    assert last["tokens_per_second"] == 100

    def wrong(*_: Any) -> None:
        raise ValueError("no such option")

    monkeypatch.setattr(contender, "run_trl", wrong)
    with pytest.raises(ValueError, match="no such option"):  # is no want of memory
        contender.run("trl-best:16", works.WORKS["tiny"], steps=3, device="cpu")


def test_bars_compare_with_the_fastest_trl(load: Any) -> None:
    def part(name: str, speed: float, peak: float, **more: Any) -> dict[str, Any]:
        flops = {"model": speed * 2e9, "executed": speed * 1e9}
        figures = {"tokens_per_second": speed, "flops_per_second": flops, "peak_bytes": peak}
        return {"name": f"llama-1b-gsm {name}", "figures": figures | more}

    parts = [
        part("samestep:layers", 70_000, 40e9),
        part("trl-best:128", 30_000, 80e9, ran="trl:64", limit_flops_per_second=1e14),
        part("trl:32", 20_000, 50e9),
        part("trl-bf16:128", 90_000, 10e9),  # loses updates
        {"name": "exactness x", "figures": {"bars": {"y": {"measured": 2, "bound": 1}}}},
        {"name": "llama-1b-long samestep", "error": "ended after 90 s"},
    ]
    parts[4]["figures"]["bars"]["y"]["holds"] = False
    found = {bar["bar"]: bar for bar in load("gpu_bars").bars(parts)}
    speed = found["llama-1b-gsm: samestep:layers, times the speed of trl:64"]
    assert speed["measured"] == pytest.approx(70 / 30)
    assert speed["holds"]
    memory = found["llama-1b-gsm: samestep:layers, times the memory of trl:64"]
    assert memory["measured"] == pytest.approx(0.5)
    assert memory["holds"]
    share = found["llama-1b-gsm: samestep:layers, share of the limit"]
    assert share["measured"] == pytest.approx(0.7)
    assert not found["exactness x: y"]["holds"]
    assert len(found) == 4
    default = {bar["bar"] for bar in load("gpu_bars").bars([*parts, part("samestep", 50_000, 1)])}
    assert "llama-1b-gsm: samestep, share of the limit" in default  # without flags where it ran


def test_rows_and_matrices_are_those_of_the_shapes(load: Any) -> None:
    works, contender = load("gpu_works"), load("gpu_contender")
    model = torch.device("meta")
    from transformers import AutoModelForCausalLM

    for name in works.SHAPES:
        with model:
            built = AutoModelForCausalLM.from_config(works.config_of(name))
        linear = [m for m in built.modules() if isinstance(m, nn.Linear)]
        body = sum(m.weight.numel() for m in linear if m is not built.lm_head)
        head = built.lm_head.weight.numel()
        assert contender.matrices(name) == {"body": body, "head": head}
    work = works.Work("tiny", batch=4)
    rows = works.rows_of(work, 2)
    assert rows == works.rows_of(work, 2)
    assert len(rows) == 8
    assert all(len(row["labels"]) == len(row["input_ids"]) for row in rows)
    found = works.flops(work, rows, contender.matrices("tiny"))
    assert 0 < found["executed"] < found["model"]


def test_the_page_says_what_was_measured_and_what_was_not(load: Any) -> None:
    section = load("gpu_section").section
    assert "Written for, not yet run" in section(None)
    figures = {
        "tokens_per_second": 1000.0,
        "flops_per_second": {"model": 2e12, "executed": 1e12},
        "peak_bytes": 3e9,
        "outside_steps": 4.0,
    }
    ended_early = {key: value for key, value in figures.items() if key != "outside_steps"}
    ended_early["ran"] = "trl:4"
    exact = {
        "losses": {"apart": 0.1},
        "bars": {},
        "float32": {"between_splits": {"a": 0.0, "b": 1e-6}, "to_float64": 2e-6},
    }
    text = section(
        {
            "device": "GPU X",
            "versions": {"torch": "9.9"},
            "limit_flops_per_second": 4e12,
            "bars": [
                {"bar": "w", "measured": 2.0, "bound": 1.9, "at_most": False, "holds": True},
                {"bar": "v", "measured": 0.7, "bound": 0.6, "at_most": True, "holds": False},
            ],
            "parts": [
                {"name": "w samestep", "figures": figures},
                {"name": "w trl-best:8", "figures": ended_early, "error": "ended after 75 s"},
                {"name": "exactness tiny", "figures": exact},
                {"name": "w trl:8", "error": "no memory"},
            ],
        }
    )
    assert "on one GPU X (torch 9.9)" in text
    assert "| w | samestep | 1,000 | 50% / 25% | 3.0 | 4 |" in text
    assert "| w | trl-best:8 (trl:4) | 1,000 | 50% / 50% | 3.0 | not known |" in text
    assert "| w | 2 | >= 1.9 | yes |\n| v | 0.7 | <= 0.6 | no |" in text
    assert "| tiny | float32 | 1.0e-06 | 2.0e-06 |" in text
    assert "- w trl:8: no memory" in text
