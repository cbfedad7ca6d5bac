"""A run.yaml from a few questions or flags: it is commented, and it runs."""

from pathlib import Path

import pytest
import yaml
from runs import llama_folder, write_rows

from samestep.cli import main
from samestep.errors import ConfigError
from samestep.train.command import read_settings
from samestep.train.init_command import init
from samestep.train.settings.objectives import OBJECTIVES
from samestep.train.trainer import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("init")
    llama_folder(path / "my: model")
    write_rows(path / "rows.jsonl", 6)
    return path


def test_answers_become_a_file_that_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    asked: list[str] = []

    def answer(question: str) -> str:
        asked.append(question)
        return ["./my: model", "rows.jsonl", "", "yes", ""][len(asked) - 1]

    assert init([], ask=answer) == 0
    assert len(asked) == 5
    text = Path("run.yaml").read_text("utf-8")
    assert sum(line.startswith("#") for line in text.splitlines()) > 8
    settings = read_settings(["run.yaml", "--batch-size", "4"])
    assert (settings.objective, settings.out, settings.lora_rank) == ("causal_lm", "runs/first", 16)
    assert settings.lr == 2e-4
    assert train(settings)["steps"] == 2


def test_flags_ask_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    given = ["--model", "./my: model", "--data", "rows.jsonl"]
    assert main(["init", "new/flags.yaml", *given]) == 0
    assert "samestep train new/flags.yaml" in capsys.readouterr().out
    values = yaml.safe_load(Path("new/flags.yaml").read_text("utf-8"))
    assert values["model"] == "./my: model"
    assert "lora_rank" not in values
    before = Path("new/flags.yaml").read_text("utf-8")
    assert main(["init", "new/flags.yaml", *given]) == 2
    assert "new/flags.yaml is there already" in capsys.readouterr().err
    assert Path("new/flags.yaml").read_text("utf-8") == before


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_has_a_file_that_reads(
    objective: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    path = tmp_path / "one.yaml"
    given = ["--model", "./my: model", "--data", "rows.jsonl", "--objective", objective]
    assert init([str(path), *given, "--lora", "no"]) == 0
    assert read_settings([str(path)]).objective == objective


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.yaml"], "no terminal to ask on: give --model MODEL --data DATA"),
        (["a.txt", "--model", "m", "--data", "d"], "a.txt: its name must end with .yaml"),
        (
            ["a.yaml", "--model", "./none", "--data", "nil.jsonl"],
            r"no folder ./none(.|\n)*nil.jsonl",
        ),
        (
            ["a.yaml", "--model", "m", "--data", "d", "--objective", "clasification"],
            "no 'clasification'; did you mean 'classification'",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        init(arguments)
    assert list(tmp_path.iterdir()) == []
