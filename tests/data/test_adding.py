"""The example of docs/adding-a-row-format.md, run from a folder outside the package."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import llama_folder, read_lines
from tiny import tiny_tokenizer

from samestep.data.load import load_rows
from samestep.data.tokenize import tokenize_rows
from samestep.engine.targets import IGNORE
from samestep.train.command import read_settings
from samestep.train.trainer import train

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-row-format.md"


def blocks(language: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (rows,), (converter, _) = blocks("json"), blocks("python")
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "my_rows.py").write_text(converter, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_of_the_page(folder: Path) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    names: dict[str, Any] = {"tokenizer": tokenizer}
    exec(blocks("python")[1], names)
    first, second = names["examples"]
    targets = first.labels[first.labels != IGNORE]
    assert tokenizer.decode(targets) == "19.<|im_end|>90.<|im_end|>"
    assert (first.weight, second.weight) == (1.0, 2.0)


def test_it_is_the_same_as_the_rows_of_messages(folder: Path) -> None:
    turns = [
        {"role": "system", "content": "euros"},
        {"role": "user", "content": "How many euros?"},
        {"role": "assistant", "content": "405."},
    ]
    by_hand = load_rows([{"messages": turns, "weight": 2}])
    converted = load_rows("rows.jsonl", row_format="my_rows.py:exchange")[1:]
    tokenizer = tiny_tokenizer(chat=True)
    assert (
        tokenize_rows(by_hand, tokenizer).fingerprint()
        == tokenize_rows(converted, tokenizer).fingerprint()
    )


def test_the_settings_of_the_page(folder: Path) -> None:
    (settings,) = blocks("yaml")
    content = {**yaml.safe_load(settings), "model": str(llama_folder(folder / "tiny"))}
    Path("run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    train(read_settings(["run.yaml"]))
    (line,) = read_lines(Path("runs/exchange/log.jsonl"))
    assert line["counts"]["example"] == 3  # the second row weighs twice
