"""What `samestep train` says of the data before its first step, as a user sees it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from runs import llama_folder
from tiny import tiny_tokenizer

from samestep.cli import main
from samestep.data.examples import Examples
from samestep.data.load import load_rows
from samestep.data.tokenize import tokenize_rows
from samestep.train.command import read_settings
from samestep.train.run_data import read_only

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("model"))


def write(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def report_of(model: Path, data: Path | str, *flags: str) -> str:
    given = ["--model", str(model), "--data", str(data), "--out", "unused", "--dry-run", *flags]
    return "\n".join(read_only(read_settings(given)))


def test_a_dry_run_says_what_would_be_learned_and_writes_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HERE)
    (model / "model.safetensors").rename(model / "aside")  # no weights are looked at
    try:
        flags = ["--model", str(model), "--out", str(tmp_path / "out"), "--dry-run"]
        flags += ["--no-measure", "--batch-size", "4"]
        assert main(["train", "--data", "sharegpt.jsonl", *flags]) == 0
    finally:
        (model / "aside").rename(model / "model.safetensors")
    said = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    data, _, _ = said.partition("What a run would take")  # tests/train/test_forecast.py
    lines = data.splitlines()
    assert lines[0] == "sharegpt.jsonl: 8 rows of ShareGPT, read as messages"
    assert lines[1] == "  columns: conversations; ignored: id"
    assert lines[2].startswith("  8 rows to learn from: ")
    assert "turns: user 16, assistant 16 (learned)" in said
    shown = "".join(line.strip() for line in lines[lines.index(_shown(lines)) + 1 : -1])
    assert "⟦4<|im_end|>⟧" in shown
    assert "⟦that is all<|im_end|>⟧" in shown
    assert lines[-1] == "2 steps of 4 examples; nothing was trained or written"
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 16


def _shown(lines: list[str]) -> str:
    return next(line for line in lines if line.endswith(":") and "targets between" in line)


def test_a_run_says_the_same_before_its_first_step(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="samestep")
    data = HERE / "empty_completion.jsonl"
    flags = ["--model", str(model), "--out", str(tmp_path / "out"), "--steps", "1"]
    assert main(["train", "--data", str(data), *flags]) == 0
    assert "1 row with an empty completion" in caplog.text
    assert "(empty_completion.jsonl:5)" in caplog.text


def test_rows_that_are_cut_are_counted_and_named_from_the_cache_too(model: Path) -> None:
    for _ in range(2):
        said = report_of(model, HERE / "truncated_silently.jsonl", "--max-length", "64")
        assert "1 row cut at 64 tokens (truncated_silently.jsonl:1)" in said
    whole = report_of(model, HERE / "truncated_silently.jsonl")
    assert "none dropped, cut or empty" in " ".join(whole.split())


LONG = " ".join(["forks"] * 40)


@pytest.mark.parametrize(
    ("objective", "row"),
    [
        ("dpo", {"prompt": "a ", "chosen": LONG, "rejected": "no"}),
        ("kto", {"prompt": "a ", "completion": LONG, "label": True}),
        ("classification", {"text": LONG, "label": "x"}),
        ("token_classification", {"tokens": ["a"] * 99, "tags": ["x"] * 99}),
        ("embedding", {"anchor": "a", "positive": LONG}),
        ("policy", {"prompt": "a ", "completion": LONG, "reward": 1}),
    ],
)
def test_every_objective_names_cut_and_dropped_rows(
    model: Path, tmp_path: Path, objective: str, row: dict[str, Any]
) -> None:
    short = {name: "b" if value == LONG else value for name, value in row.items()}
    if "tokens" in row:
        short |= {"tokens": ["b"], "tags": ["y"]}
    if "label" in row:
        short["label"] = False if row["label"] is True else "y"
    rows = [{**short, "weight": 0}, short, row, {**short, "other": 1}]
    flags = ["--objective", objective, "--max-length", "16"]
    said = report_of(model, write(tmp_path, *rows), *flags)
    assert "1 row dropped: weight 0 (rows.jsonl:1)" in said
    (cut,) = re.findall(r"rows? cut at 16 tokens \((.*?)\)", " ".join(said.split()))
    assert "rows.jsonl:3" in cut  # of kto also the row before, which borrows its completion
    assert "ignored: other" in said
    assert "rows.jsonl:2" in said  # the first that is learned from is shown


@pytest.mark.parametrize("weight", [0, 0.0, "0"])
def test_a_row_of_weight_0_is_not_learned_as_a_turn_of_weight_0_is(
    model: Path, tmp_path: Path, weight: Any
) -> None:
    rows = [{"text": "some words"}, {"text": "some words", "weight": weight}]
    said = report_of(model, write(tmp_path, *rows))
    assert "1 row dropped: weight 0 (rows.jsonl:2)" in said


def test_append_eos_without_an_end_is_said(model: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for path in model.glob("*.json"):
        (tokenizer / path.name).write_bytes(path.read_bytes())
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    data = write(tmp_path, {"text": "some words"})
    flags = ["--tokenizer", str(tokenizer)]
    assert "the tokenizer has no end-of-sequence token" in report_of(model, data, *flags)
    off = report_of(model, data, *flags, "--no-append-eos")
    assert "end-of-sequence" not in off


def test_roles_that_nobody_knows_are_counted(model: Path, tmp_path: Path) -> None:
    talk = [{"role": role, "content": "a"} for role in ("user", "narrator", "assistant")]
    said = report_of(model, write(tmp_path, {"messages": talk}))
    assert "narrator 1 (not learned: no role that is known here)" in " ".join(said.split())


def test_rows_without_a_target_name_the_roles_found(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path, {"messages": [{"role": "narrator", "content": "a"}]})
    flags = ["--model", str(model), "--out", str(tmp_path / "out")]
    assert main(["train", "--data", data, *flags]) == 2
    assert "roles found: narrator" in capsys.readouterr().err


def test_empty_turns_are_counted(model: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]
    said = report_of(model, write(tmp_path, {"messages": talk}))
    assert "1 row with an empty assistant turn" in said


def test_what_a_row_holds_cannot_steer_the_terminal(model: Path, tmp_path: Path) -> None:
    text = "\x1b[2J\u202e\x07" + "漢字" * 600 + "\n" * 40
    said = report_of(model, write(tmp_path, {"text": text}))
    assert not {"\x1b", "\u202e", "\x07"} & set(said)
    assert len(said.splitlines()) <= 20


def test_a_cache_of_an_earlier_release_is_made_again(tmp_path: Path) -> None:
    rows = load_rows([{"text": "forks and forks"}])
    settings: dict[str, Any] = {"cache": tmp_path, "max_length": 2}
    tokenize_rows(rows, tiny_tokenizer(), **settings)
    (path,) = tmp_path.iterdir()
    earlier = Examples.load(path)
    earlier.cut = None
    earlier.save(path)
    assert tokenize_rows(rows, tiny_tokenizer(), **settings).cut == {"cut at 2 tokens": 1}
