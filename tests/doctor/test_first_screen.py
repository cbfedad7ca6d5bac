"""The first screen of the README: each command is there, and the lines of Python run."""

import re
import sys
from pathlib import Path

import pytest

from samestep.cli import USAGE

ROOT = Path(__file__).parents[2]


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    screen = text.split("## Where to start\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", screen, re.DOTALL)


def test_a_doubt_a_cure_a_loop_a_trainer_a_study_in_this_order() -> None:
    lines = [line for block in blocks(r"\w+") for line in block.splitlines() if line]
    order = ["samestep doctor", "exact(", "own_loop.py", "make demo", "make study"]
    found = [next(at for at, line in enumerate(lines) if text in line) for text in order]
    assert found == sorted(found)


def test_each_command_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in "".join(blocks("bash")).splitlines():
        program, word, *rest = line.split()
        if program == "samestep":
            assert f"\n  {word} " in USAGE
        elif program == "make":
            assert re.search(rf"^{word}: ", makefile, re.MULTILINE)
        else:
            rest = [word, *rest]
        assert all((ROOT / path).is_file() for path in rest), line


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")  # of PyTorch without a GPU
def test_the_lines_of_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "examples", raising=False)
    (block,) = blocks("python")
    assert len(block.split("\n\n")) == 2
    exec(block, {})
