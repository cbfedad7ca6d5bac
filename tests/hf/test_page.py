"""The code of docs/trainers.md runs, block after block."""

import re
from pathlib import Path
from typing import Any

import pytest
from exact_cases import tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL against transformers
def test_the_page_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 9
    names: dict[str, Any] = {"make_tokenizer": tokenizer}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
