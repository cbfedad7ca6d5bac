"""`samestep doctor`: probes in processes of their own, what is known, and what to do."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import known_faults
from samestep.cli import main
from samestep.doctor import command, environment, run
from samestep.doctor.advice import advise
from samestep.doctor.known import line_on_class, lines_on, measured, upgrade
from samestep.doctor.probes import PROBES, model_source, run_probe
from samestep.doctor.report import print_doctor
from samestep.errors import CheckError

LOOP = """
import torch
examples = [torch.full((n, 2), float(n)) for n in (1, 4, 2, 3)]
model = lambda: torch.nn.Linear(2, 1)
collate = torch.cat
def step(model, micro_batches):
    {crash}
    count = {count}
    for micro in micro_batches:
        (model(micro).square().sum() / count(micro, micro_batches)).backward()
"""
MEAN = "lambda micro, micros: len(micro) * len(micros)"
WHOLE = "lambda micro, micros: sum(map(len, micros))"


def loop(folder: Path, count: str, crash: str = "pass") -> str:
    path = folder / "loop.py"
    path.write_text(LOOP.format(count=count, crash=crash), encoding="utf-8")
    return str(path)


def test_a_file_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--trainer", loop(tmp_path, MEAN), "--json", f"{tmp_path}/r.json"]) == 1
    out = capsys.readouterr().out
    assert "mean-of-means" in out
    assert "samestep.step" in out
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert (found["verdict"], len(found["probes"])) == ("inexact", 1)


@pytest.mark.thorough
def test_a_probe_that_dies_ends_alone(tmp_path: Path) -> None:
    dying = tmp_path / "dying"
    dying.mkdir()
    bad, good = loop(dying, WHOLE, "import os; os._exit(3)"), loop(tmp_path, WHOLE)
    found = run.run_all([f"trainer:{bad}", f"trainer:{good}"], seconds=120)
    assert [probe["verdict"] for probe in found] == ["not run", "exact"]
    assert "code 3" in found[0]["why"]


def test_a_probe_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "import time; time.sleep(60)"
    monkeypatch.setattr(run, "WORKER", [sys.executable, "-c", slow])
    found = run.run_all(["accelerate"], seconds=0.5)
    assert "stopped after 0.5 s" in found[0]["why"]


def test_a_trainer_is_cured_by_exact() -> None:
    found = run_probe("classification")
    assert found["verdict"] == "inexact"
    assert found["axes"][0]["ratio"] == pytest.approx(8, rel=1e-6)
    assert found["cure"]["verdict"] == "exact"
    assert "samestep.hf.exact" in advise([found], {"transformers": "5.24.0"})[0]


def test_a_class_by_name_and_by_folder(tmp_path: Path) -> None:
    import transformers

    transformers.LlamaConfig(
        hidden_size=4096, architectures=["LlamaForCausalLM"], num_hidden_layers=32
    ).save_pretrained(tmp_path)
    trainer = model_source(str(tmp_path))()(
        per_device_train_batch_size=2, gradient_accumulation_steps=1
    )
    assert type(trainer.model).__name__ == "LlamaForCausalLM"
    assert trainer.model.num_parameters() < 1e6, "at reduced size"
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckError, match="names no architecture"):
        model_source(str(tmp_path))
    with pytest.raises(CheckError, match="did you mean 'BertForMaskedLM'"):
        model_source("BertForMaskedLm")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckError, match=r"no config\.json"):
        model_source(str(tmp_path / "empty"))


def test_what_is_not_installed_is_not_probed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "LIBRARIES", ("no-such-library",))
    monkeypatch.setattr("samestep.doctor.probes.PROBES", {})
    monkeypatch.setattr(command, "installed", lambda: {"torch": "2.13.0", "transformers": None})
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "not installed: transformers" in out
    assert "samestep check --init" in out
    assert not [probe for probe in PROBES.values() if "torch" in probe.needs]


def probe(name: str, verdict: str, **more: Any) -> dict[str, Any]:
    axes = [{"name": "micro-batch", "verdict": verdict, "ratio": 8.0, "relative_difference": 7.0}]
    return {"probe": name, "title": name, "verdict": verdict, "axes": axes, "cure": None} | more


def test_advice_names_a_cure_a_refusal_and_what_was_not_run() -> None:
    cure = {"name": "samestep.hf.exact(trainer)", "verdict": "not run", "why": "head:\n- no way"}
    lines = advise(
        [
            probe("x", "inexact", cure=cure),
            probe("y", "not run", why="boom\nmore"),
            probe("z", "exact"),
        ],
        {"transformers": "5.24.0"},
    )
    assert lines == [
        "x: no samestep.hf.exact(trainer): head: no way", "y could not be run: boom",
    ]  # fmt: skip
    assert advise([probe("z", "exact")], {}) == ["nothing: what is installed here is exact"]


def release_of(number: str, **scales: float) -> dict[str, Any]:
    kinds = {
        kind: {"inexact": ["micro-batch"] if scale != 1 else [], "scale": scale}
        for kind, scale in scales.items()
    }
    return {"versions": {"transformers": number}, "kinds": kinds}


def test_the_nearest_release_before_is_told_and_the_first_exact_one_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = {
        "releases": [
            release_of("4.44.2", causal_lm=1.243, masked_lm=1.144),
            release_of("4.57.1", causal_lm=1.0, masked_lm=1.144),
            release_of("5.24.0", causal_lm=1.0, masked_lm=9.4),
        ]
    }
    monkeypatch.setattr("samestep.doctor.known.known", lambda: content)
    entry = measured("4.50.0.dev0")
    assert entry is not None
    assert entry["versions"]["transformers"] == "4.44.2"
    assert "the nearest release before yours" in lines_on("4.50")[0]
    assert "  causal LM: step x 1.243" in lines_on("4.44.2")
    assert "oldest" in lines_on("4.40.0")[0]
    assert upgrade("4.44.2", ["causal_lm"]) == "4.57.1"
    content["releases"][1]["kinds"]["causal_lm"]["unknown"] = ["short-window"]
    assert upgrade("4.44.2", ["causal_lm"]) == "5.24.0", "what was not measured is not promised"
    assert "  causal LM: exact, where it could be measured" in lines_on("4.57.1")
    del content["releases"][1]["kinds"]["causal_lm"]["unknown"]
    assert upgrade("4.44.2", ["causal_lm", "masked_lm"]) is None
    found = probe("causal_lm", "inexact", cure=probe("c", "exact") | {"name": "cure"})
    assert "4.57.1" in advise([found], {"transformers": "4.44.2"})[1]


def test_the_shipped_file_is_made_of_the_results() -> None:
    assert known_faults.KNOWN.read_text(encoding="utf-8") == known_faults.text()
    assert "x 4 at accumulation 4" in str(line_on_class("BertForSequenceClassification"))
    assert line_on_class("NoSuchModel") is None


def test_the_report_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    axes = [
        {"name": name, "verdict": "inexact", "ratio": 1.0, "relative_difference": 1e-10}
        for name in ("micro-batch", "short-window", "reported", "evaluation-batch")
    ]
    cure = {"name": "samestep.loops.lightning.exact(module)", "verdict": "exact", "axes": axes}
    report = {
        "versions": {"python": "3.11", "trl": None},
        "known": ["measured with " + "x" * 90, "  causal LM: " + "word " * 30],
        "probes": [probe("a", "inexact", title="Trainer, classifier", cure=cure, axes=axes),
                   probe("b", "not run", why="odd \x1b[2J text")],
        "advice": ["do [bold]this[/bold] " + "and that " * 20],
    }  # fmt: skip
    print_doctor(report, Console(width=80))
    out = capsys.readouterr().out
    long = [line for line in out.splitlines() if len(line) > 80 and "xxx" not in line]
    assert not long
    assert "off by 1e-10" in out
    assert "[bold]this[/bold]" in out
