"""The script for a GPU works without one: it goes on past parts that fail, and tells results."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_a_part_that_fails_hangs_or_says_nothing_is_noted_and_the_next_begins(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load("gpu_run")
    so_far = "import time; print('{\"a\": 1}', flush=True); "
    found = [
        script.Part("fails", ("-c", "raise SystemExit('no memory')"), 20),
        script.Part("hangs", ("-c", so_far + "time.sleep(60)"), 0.5),
        script.Part("silent", ("-c", "print('hello')"), 20),
        script.Part("counts", ("-c", so_far + "print('{\"a\": 2}')"), 20),
        script.Part("tests", ("-c", "print('3 passed')"), 20, figures=False),
    ]
    monkeypatch.setattr(script, "parts", lambda device, *, tiny: found)
    out = tmp_path / "gpu.json"
    arguments = ["gpu_run.py", "--device", "cpu", "--out", str(out), "--minutes", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert script.main() == 0
    fails, hangs, silent, counts, tests = json.loads(out.read_text(encoding="utf-8"))["parts"]
    assert fails["error"] == "exit code 1: no memory"
    assert hangs["error"].startswith("ended after ")
    assert silent["error"] == "exit code 0: hello"
    assert counts["figures"] == {"a": 2}
    assert tests["figures"] == {"told": "3 passed"}


def test_every_part_names_a_script_that_exists(load: Any) -> None:
    script = load("gpu_run")
    for part in [*script.parts("cuda", tiny=False), *script.parts("cpu", tiny=True)]:
        named = [each for each in part.command if each.endswith((".py", "tests/gpu"))]
        assert named
        assert all(Path(each).exists() for each in named), part


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
    exact = {"float32": {"between_splits": {"a": 0.0, "b": 1e-6}, "to_float64": 2e-6}}
    text = section(
        {
            "device": "GPU X",
            "versions": {"torch": "9.9"},
            "parts": [
                {"name": "limit", "figures": {"flops_per_second": 4e12}},
                {"name": "w samestep", "figures": figures},
                {"name": "exactness tiny", "figures": exact},
                {"name": "w trl:8", "error": "no memory"},
            ],
        }
    )
    assert "on one GPU X (torch 9.9)" in text
    assert "| w | samestep | 1,000 | 50% / 25% | 3.0 | 4 |" in text
    assert "| tiny | float32 | 1.0e-06 | 2.0e-06 |" in text
    assert "- w trl:8: no memory" in text
