"""Every small input of a newcomer, trained through the command, or refused in plain words."""

from pathlib import Path

import pytest
from runs import llama_folder

from samestep.cli import main

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("model"))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("sharegpt.jsonl", "causal_lm"),
        ("parts.jsonl", "causal_lm"),
        ("role_human.jsonl", "causal_lm"),
        ("truncated_silently.jsonl", "causal_lm"),
        ("empty_completion.jsonl", "causal_lm"),
        ("semicolon.csv", "causal_lm"),
        ("pref_dup_prompt.jsonl", "dpo"),
    ],
)
def test_the_input_is_trained(model: Path, tmp_path: Path, name: str, objective: str) -> None:
    flags = ["--model", str(model), "--data", str(HERE / name), "--out", str(tmp_path / "out")]
    flags += ["--objective", objective, "--steps", "1", "--batch-size", "4", "--max-length", "64"]
    assert main(["train", *flags]) == 0
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


def test_calls_of_tools_are_trained_through_their_template(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    template = (HERE / "tool_template.jinja").read_bytes()
    (folder / "chat_template.jinja").write_bytes(template)
    data = str(HERE / "openai_tools.jsonl")
    flags = ["--model", str(folder), "--data", data, "--out", str(tmp_path / "out")]
    assert main(["train", *flags, "--steps", "1", "--max-length", "256"]) == 0


def test_a_typo_in_a_role_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(HERE / "one_typo.jsonl")
    flags = ["--model", str(model), "--data", data, "--out", str(tmp_path / "out")]
    assert main(["train", *flags]) == 2
    assert "did you mean 'assistant'?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
