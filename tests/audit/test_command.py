from pathlib import Path

import pytest

from samestep.audit.axes.table import AXES
from samestep.audit.check import load_subject
from samestep.cli import main
from samestep.errors import CheckError


def test_the_template_runs_and_is_inexact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "loop.py"
    assert main(["check", "--init", str(file)]) == 0
    page, data = tmp_path / "r.html", tmp_path / "r.json"
    assert main(["check", str(file), "--html", str(page), "--json", str(data)]) == 1
    assert "mean-of-means" in capsys.readouterr().out
    assert '"verdict": "inexact"' in data.read_text(encoding="utf-8")
    assert "<svg" in page.read_text(encoding="utf-8")


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no file"),
        ("1 / 0\n", "ZeroDivisionError"),
        ("x = 1\n", "lacks"),
        ("import os\nos._exit(7)\n", "ended with code 7"),
        ("import time\ntime.sleep(60)\n", "stopped after"),
    ],
)
def test_what_cannot_be_run_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    file = tmp_path / "loop.py"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    # Only what hangs is timed: a busy machine may take long to start.
    timed = ["--timeout", "3"] if message == "stopped after" else []
    assert main(["check", str(file), *timed]) == 2
    assert message in capsys.readouterr().err


def test_a_name_may_be_made_when_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "lazy.py"
    path.write_text(
        "def __getattr__(name):\n"
        "    if name != 'made':\n"
        "        raise AttributeError(name)\n"
        "    return {}\n",
        encoding="utf-8",
    )
    with pytest.raises(CheckError, match="the subject lacks"):
        load_subject(f"{path}:made")
    with pytest.raises(CheckError, match="has no 'other'"):
        load_subject(f"{path}:other")


def test_help_names_every_axis(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    words = capsys.readouterr().out.replace(",", " ").replace(".", " ").split()
    assert not [name for name in AXES if name not in words]
