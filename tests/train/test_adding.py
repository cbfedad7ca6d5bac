"""The pages "Adding a ...": their examples run from a folder outside the package."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from runs import llama_folder, read_lines, write_rows
from safetensors.torch import load_file

from samestep.train.command import read_settings
from samestep.train.trainer import train

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ["adding-an-optimizer.md", "adding-an-objective.md"]


def write_example(page: str, folder: Path) -> None:
    """The files of a page, with a tiny model and rows in the place of real ones."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for name, content in re.findall(r'```\w+ title="(.+?)"\n(.*?)```', text, re.DOTALL):
        (folder / name).write_text(content, encoding="utf-8")
    run = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    tiny = {"model": "tiny", "steps": 4, "batch_size": 8, "precision": "float64", "save_every": 2}
    (folder / "run.yaml").write_text(yaml.safe_dump({**run, **tiny}), encoding="utf-8")
    llama_folder(folder / "tiny")
    write_rows(folder / "rows.jsonl", 20)


@pytest.mark.parametrize("page", PAGES)
def test_the_example_trains_for_any_split_and_resumes(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_example(page, tmp_path)
    train(read_settings(["run.yaml", "--out", "a"]))
    train(read_settings(["run.yaml", "--out", "b", "--micro-batch", "3", "--padding", "left"]))
    weights = [load_file(tmp_path / out / "model" / "model.safetensors") for out in ("a", "b")]
    for name, weight in weights[0].items():
        assert float((weights[1][name] - weight).norm() / weight.norm()) < 1e-12, name
    for path in (tmp_path / "b" / "checkpoints" / "step-00000004").iterdir():
        path.unlink()
    (tmp_path / "b" / "checkpoints" / "step-00000004").rmdir()
    flags = ["--micro-batch", "3", "--padding", "left", "--resume"]
    train(read_settings(["run.yaml", "--out", "b", *flags]))
    resumed = load_file(tmp_path / "b" / "model" / "model.safetensors")
    assert all(torch.equal(resumed[name], weight) for name, weight in weights[1].items())
    lines = read_lines(tmp_path / "a" / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert len({line["loss"] for line in lines}) == 4


def test_an_added_objective_is_in_the_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_example("adding-an-objective.md", tmp_path)
    with pytest.raises(SystemExit):
        read_settings(["--objective", "focal.py:Focal", "--help"])
    shown = capsys.readouterr().out
    assert "--gamma" in shown
    assert "its probability grows" in shown


def test_the_tables_in_the_docs_are_current() -> None:
    command = [sys.executable, str(DOCS / "generate_tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
