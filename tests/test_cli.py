"""The command as a user runs it: in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import samestep
from runs import llama_folder, write_rows

from samestep.cli import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama_folder(tmp_path / "tiny")
    write_rows(tmp_path / "rows.jsonl", 20)
    (tmp_path / "run.yaml").write_text(
        "model: tiny\ndata: rows.jsonl\nout: out\nbatch_size: 8\nsteps: 2\n", encoding="utf-8"
    )
    return tmp_path


def test_a_run_shows_plain_lines_and_ends_with_its_result(folder: Path) -> None:
    done = samestep("train", "run.yaml", "--eval-data", "rows.jsonl", folder=folder)
    assert done.code == 0, done.err
    assert "step 2/2  loss" in done.err
    assert "tokens/s" in done.err
    assert "eta" in done.err
    assert "evaluation loss" in done.out
    assert "model in out/model" in done.out
    assert "\x1b" not in done.err + done.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "run.yaml", "--data", "none.jsonl"], 2, "none.jsonl"),
        (["train", "run.yaml", "--model", "./none"], 2, "no folder"),
        (["train", "run.yaml", "--batch-sise", "3"], 2, "batch-si"),
        (["train", "missing.yaml"], 2, "missing.yaml"),
        (["tain"], 2, "did you mean 'train'"),
    ],
)
def test_mistakes_end_in_one_message_without_a_traceback(
    folder: Path, arguments: list[str], code: int, message: str
) -> None:
    done = samestep(*arguments, folder=folder)
    assert done.code == code
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (folder / "out").exists()


def test_debug_shows_the_traceback(folder: Path) -> None:
    done = samestep("train", "run.yaml", "--data", "none.jsonl", "--debug", folder=folder)
    assert done.code == 1
    assert "Traceback" in done.err


def test_a_run_that_fails_ends_with_1(folder: Path) -> None:
    wild = ["--optimizer", "sgd", "--lr", "1e30", "--max-grad-norm", "None"]
    done = samestep("train", "run.yaml", *wild, folder=folder)
    assert done.code == 1
    assert "the step was not taken" in done.err


def test_help_and_version_need_no_heavy_import(folder: Path) -> None:
    heavy = ("torch", "transformers", "datasets", "tyro", "pydantic")
    code = (
        "import sys; from samestep.cli import main\n"
        "assert main(['--help']) == 0 and main(['--version']) == 0\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")


def test_train_help_lists_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    from samestep.train.settings.language import CausalLMSettings

    with pytest.raises(SystemExit) as exit_:
        main(["train", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for name in CausalLMSettings.model_fields:
        assert "--" + name.replace("_", "-") in text
