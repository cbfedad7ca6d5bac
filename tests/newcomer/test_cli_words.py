"""Words and flags of `samestep train`: where the file may stand, and what peers' names are here."""

import re
from pathlib import Path

import pytest
from command_line import samestep
from runs import llama_folder, write_rows

from samestep.errors import ConfigError
from samestep.train.command import read_settings
from samestep.train.settings.objectives import OBJECTIVES, settings_class
from samestep.train.settings.peers import PEER_FIELDS, PEER_OBJECTIVES

FIELDS = {name for row in OBJECTIVES.values() for name in row.settings.model_fields}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama_folder(tmp_path / "tiny")
    write_rows(tmp_path / "rows.jsonl", 20)
    (tmp_path / "run.yaml").write_text(
        "model: tiny\ndata: rows.jsonl\nout: out\nbatch_size: 8\nsteps: 2\n", encoding="utf-8"
    )
    return tmp_path


@pytest.mark.parametrize(
    "before",
    [
        ["--lr", "1e-3"],
        ["--lr=1e-3", "--no-append-eos"],
        ["--lora-rank", "4", "--lora-targets", "q_proj", "v_proj"],
        ["--resume"],
        ["--track", "tensorboard", "--steps", "3"],
    ],
)
def test_the_file_may_stand_anywhere(folder: Path, before: list[str]) -> None:
    file = str(folder / "run.yaml")
    expected = read_settings([file, *before])
    assert expected.batch_size == 8
    assert read_settings([*before, file]) == expected
    assert read_settings([*before, file, "--seed", "0"]) == expected


def test_two_files_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"one file at a time: found a\.yaml and b\.yaml"):
        read_settings(["a.yaml", "--lr", "1", "b.yaml"])


def test_all_wrong_words_are_said_at_once_and_soon(folder: Path) -> None:
    (folder / "wrong.yaml").write_text(
        "learning_rate: 1\nbatch_sise: 2\nsteps: none\n", encoding="utf-8"
    )
    flags = ["--modle", "tiny", "--per-device-train-batch-size=2", "--beta", "1"]
    done = samestep("train", *flags, "wrong.yaml", folder=folder)
    assert done.code == 2
    assert done.err.splitlines() == [
        "samestep: error: the settings are wrong:",
        "  - wrong.yaml: learning_rate: no such field; here it is 'lr'",
        "  - wrong.yaml: batch_sise: no such field; did you mean 'batch_size'?",
        "  - wrong.yaml: steps: input should be a valid integer, unable to parse string as an "
        "integer; found 'none'",
        "  - --modle: no such flag; did you mean '--model'?",
        "  - --per-device-train-batch-size: no such flag; here it is --micro-batch (it cannot "
        "change the step; the examples of a whole step are batch_size)",
        "  - --beta: no such flag; --beta belongs to objective dpo, simpo, cpo, orpo, kto, and "
        "this is causal_lm",
        "  - wrong.yaml lacks model, data, out; as flags: --model MODEL --data DATA --out OUT",
    ]
    assert not done.out


@pytest.mark.parametrize(
    "wrong",
    [
        ["--modle", "x"],
        ["--data", "nowhere.jsonl", "--model", "./none"],
        ["--objective", "sft"],
        ["--steps", "3", "--epochs", "3"],
    ],
)
def test_an_error_loads_no_pytorch(folder: Path, wrong: list[str]) -> None:
    done = samestep("train", "run.yaml", *wrong, folder=folder, python=("-X", "importtime"))
    assert done.code == 2
    imported = {line.rpartition("|")[2].strip() for line in done.err.splitlines() if "|" in line}
    assert "samestep.train.settings.base" in imported
    assert not imported & {"torch", "transformers", "datasets"}


def test_missing_files_are_said_together(folder: Path) -> None:
    flags = ["--data", "row.jsonl", "--eval-data", "no/where/at.jsonl", "--model", "./tin"]
    done = samestep("train", "run.yaml", *flags, folder=folder)
    assert done.code == 2
    assert "model: there is no folder ./tin; did you mean 'tiny'?" in done.err
    assert "data: there is no file row.jsonl; did you mean 'rows.jsonl'?" in done.err
    assert "eval_data: there is no file no/where/at.jsonl (" in done.err


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", PEER_FIELDS)
def test_every_name_of_peers_is_answered_in_files_and_as_a_flag(name: str, tmp_path: Path) -> None:
    meaning = PEER_FIELDS[name]
    assert name not in FIELDS
    assert meaning.field in FIELDS | {None}
    assert meaning.field or meaning.note
    answer = meaning.field or meaning.note
    flag = [f"--{name.replace('_', '-')}", "1", "--model", "m", "--data", "d", "--out", "o"]
    with pytest.raises(ConfigError) as error:
        read_settings(flag)
    assert answer in str(error.value).replace("-", "_") or answer in str(error.value)
    file = tmp_path / "run.yaml"
    file.write_text(f"{name}: 1\nmodel: m\ndata: d\nout: o\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(answer)):
        read_settings([str(file)])


@pytest.mark.parametrize("name", PEER_OBJECTIVES)
def test_every_objective_of_peers_is_answered(name: str) -> None:
    assert name not in OBJECTIVES
    assert PEER_OBJECTIVES[name].field in OBJECTIVES
    with pytest.raises(ConfigError, match=f"here it is '{PEER_OBJECTIVES[name].field}'"):
        settings_class(name)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_help_comes_in_groups_with_examples(
    objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        read_settings(["--objective", objective, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for name in OBJECTIVES[objective].settings.model_fields:
        assert text.count(f"\n  --{name.replace('_', '-')}") >= 1, name
    assert "examples:\n  samestep train" in text
    assert text.index("memory and speed") > text.index("the step, and how long")


def test_a_file_alone_is_no_command(folder: Path) -> None:
    done = samestep("run.yaml", folder=folder)
    assert done.code == 2
    assert "samestep train run.yaml" in done.err
