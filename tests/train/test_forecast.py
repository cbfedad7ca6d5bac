"""`samestep train --dry-run`: what a run would take, as a user sees it, and what it counts."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from objective_runs import CASES, configured
from runs import llama_folder, write_rows

from samestep.cli import main
from samestep.train import forecast as forecasts
from samestep.train.command import read_settings
from samestep.train.forecast import forecast
from samestep.train.memory_parts import memory_parts
from samestep.train.precision import choose_precision
from samestep.train.run_data import check_references, load_data
from samestep.train.setup import set_up
from samestep.train.trainer import train


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forecast")
    llama_folder(folder / "model")
    write_rows(folder / "rows.jsonl", 10)
    return folder


def said(files: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    given = ["--model", str(files / "model"), "--data", str(files / "rows.jsonl")]
    out = files / "out"
    assert main(["train", *given, "--out", str(out), "--batch-size", "4", "--dry-run", *flags]) == 0
    assert not out.exists()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    return lines[next(at for at, line in enumerate(lines) if "would take" in line) :]


NAMES = {
    "weights that train": 1,
    "sums of gradients": 1,
    "moments of the optimizer": 2,
    "moving average (ema)": 1,
}
"""Parts of a run of AdamW with an average, and how many times the weights each is."""


def size_of(lines: list[str], name: str) -> float:
    """The bytes that a line says."""
    line = next(line for line in lines if line.endswith(name) or f"{name}: " in line)
    found = re.search(r"([\d.]+) (GB|MB|kB)", line)
    assert found is not None
    return float(found[1]) * {"GB": 1e9, "MB": 1e6, "kB": 1e3}[found[2]]


def test_a_dry_run_says_memory_by_part_and_time(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = said(files, capsys, "--ema", "0.9", "--epochs", "2")
    weights = 4 * 36000.0
    for name, times in NAMES.items():
        assert size_of(lines, name) == pytest.approx(times * weights, rel=5e-3)
    assert any("activations of a micro-batch of" in line for line in lines)
    lasting = [size_of(lines, name) for name in NAMES]
    assert size_of(lines, "memory") > sum(lasting)
    time = next(line for line in lines if line.startswith("  time:"))
    assert re.search(r"[\d.e-]+ s for the first step \(\d+ tokens; \d of \d micro-batches", time)
    assert any(re.search(r"\d:\d\d:\d\d for 6 steps of \d+ tokens on average", x) for x in lines)


def test_without_measuring_no_weight_is_loaded(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = files / "model" / "model.safetensors"
    weights.rename(files / "aside")
    try:
        lines = said(files, capsys, "--no-measure", "--lora-rank", "4")
    finally:
        (files / "aside").rename(weights)
    assert size_of(lines, "weights that do not train") == pytest.approx(4 * 36000, rel=5e-3)
    assert lines[-1] == "  time: not measured (--no-measure)"


def test_what_does_not_fit_is_not_loaded(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(files, capsys, "--memory-limit", "1e-4")
    assert "activations; this process may take 100 kB" in lines[1]
    assert lines[-1] == "  time: not measured, since that does not fit into memory"
    assert any("more than there is" in line for line in lines)


@pytest.mark.sampled(16)
@pytest.mark.parametrize("case", [*CASES, "dpo moving", "dpo adapters"])
def test_what_is_counted_without_weights_is_what_a_run_holds(tmp_path: Path, case: str) -> None:
    changes: dict[str, Any] = {
        "dpo moving": {"sync_ref_model": True},
        "dpo adapters": {"lora_rank": 2},
    }.get(case, {})
    run = configured(tmp_path, case.split()[0] if changes else case, **changes)
    settings = choose_precision(run)
    loaded = load_data(check_references(settings))
    device = torch.device("cpu")
    counted = forecasts._parts_without_weights(settings, loaded, device=device)
    setup = set_up(settings, loaded=loaded)
    held = memory_parts(setup.model, setup.objective, settings)
    assert counted == held
    # A second model beside the one that trains: a reference, a teacher.
    second = {"dpo", "kto"} & {case.split()[0]} and "adapters" not in case
    second = second or case in ("distillation", "distillation kl", "policy kl")
    others = set(held) & {"reference", "teacher"}
    assert bool(others) == bool(second), held
    for name in others:
        assert held[name] == held["weights that train"] + held.get("weights that do not train", 0)


def test_a_step_too_long_is_measured_in_part(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecasts, "_SECONDS", 0.0)
    lines = said(files, capsys, "--micro-batch", "1")
    assert any("1 of 4 micro-batches were run" in line for line in lines)


def test_a_run_after_a_forecast_is_the_same_run(files: Path, tmp_path: Path) -> None:
    def settings(out: str) -> Any:
        given = ["--model", str(files / "model"), "--data", str(files / "rows.jsonl")]
        flags = ["--out", str(tmp_path / out), "--steps", "1", "--micro-batch", "2"]
        return read_settings([*given, *flags])

    def digest(out: str) -> bytes:
        train(settings(out))
        return (tmp_path / out / "model" / "model.safetensors").read_bytes()

    before = digest("a")
    assert list(forecast(settings("b"), load_data(check_references(settings("b")))))
    assert digest("b") == before
