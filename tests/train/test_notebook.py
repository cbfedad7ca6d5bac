"""A run in a notebook: one display that moves, and a line for what is said."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from runs import run_config

from samestep.engine.step import StepReport
from samestep.train.notebook import in_notebook
from samestep.train.reporter import RunConsole
from samestep.train.trainer import train


class Notebook(ModuleType):
    """What IPython offers, and what a browser would be sent."""

    def __init__(self, shell: Any) -> None:
        super().__init__("IPython")
        self.shell, self.sent = shell, []
        self.display = SimpleNamespace(display=self.show)

    def get_ipython(self) -> Any:
        return self.shell

    def show(self, content: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        self.sent.append(content)
        return SimpleNamespace(update=lambda content, raw: self.sent.append(content))


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Notebook:
    made = Notebook(SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", made)
    monkeypatch.setitem(sys.modules, "IPython.display", made.display)
    return made


def report(loss: float) -> StepReport:
    return StepReport(
        loss=loss, terms={}, counts={}, grad_norm=1.0, seconds=0.1, tokens=10, micro_batches=1
    )


def test_a_thousand_steps_are_one_display(
    notebook: Notebook, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    with RunConsole(total=1000, done=0, clock=lambda: now[0]) as shown:
        for step in range(1000):
            now[0] += 0.01
            shown.step(report(float(step)), lr=1e-3)
            shown.micro_batch("step", 1, 2)
        shown.say("checkpoint <1>")
    found = capsys.readouterr()
    assert found.out == "checkpoint <1>\n"
    assert found.err == ""
    assert len(notebook.sent) < 60  # ten seconds, five drawings in each
    first, last = notebook.sent[0], notebook.sent[-1]
    assert first["text/plain"] == "step 0/1000  starting"
    assert "step 1000/1000  " in last["text/plain"]
    assert "loss 999.0000" in last["text/plain"]
    assert '<progress value="1000" max="1000"></progress>' in last["text/html"]


def test_a_run_in_a_notebook(
    notebook: Notebook, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(run_config(tmp_path, steps=3, batch_size=4, micro_batch=4, eval_data=_rows(tmp_path)))
    found = capsys.readouterr()
    lines = found.out.splitlines()
    assert not [line for line in lines + found.err.splitlines() if line.startswith("step ")]
    assert sum("evaluation after step" in line for line in lines) == 2
    assert notebook.sent[-1]["text/plain"].startswith("step 3/3  loss ")


def _rows(folder: Path) -> str:
    (folder / "eval.jsonl").write_text('{"prompt": "a", "completion": " b"}\n', encoding="utf-8")
    return str(folder / "eval.jsonl")


def test_elsewhere_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not in_notebook()
    for shell in (None, SimpleNamespace()):  # a script, and ipython in a terminal
        monkeypatch.setitem(sys.modules, "IPython", Notebook(shell))
        assert not in_notebook()
    with RunConsole(total=2, done=0) as shown:
        shown.step(report(1.0), lr=1e-3)
    assert capsys.readouterr().err.startswith("step 1/2  loss 1.0000")
