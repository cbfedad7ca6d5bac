import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samestep.utils.text import printable

EVIL = "\x1b]0;owned\x07\x1b[2J"


@given(st.text())
def test_nothing_steers_a_terminal(text: str) -> None:
    assert all(letter.isprintable() or letter in "\n\t" for letter in printable(text))


def test_plain_text_stays_as_it_is() -> None:
    assert printable("größer\n\tab 🙂 \\") == "größer\n\tab 🙂 \\"
    assert printable(EVIL) == r"\x1b]0;owned\x07\x1b[2J"


@pytest.mark.parametrize("row", [{EVIL: 1}, {"prompt": EVIL, "completion": 3}, {"messages": EVIL}])
def test_rows_and_paths_reach_the_terminal_spelled_out(tmp_path: Path, row: object) -> None:
    path = tmp_path / f"rows{EVIL}.jsonl".replace("/", "")
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    arguments = ["train", "--model", "none", "--out", str(tmp_path / "out"), "--data", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "samestep", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "\x1b" not in done.stderr + done.stdout
