"""`samestep check` and `study` as a user sees them: what fails, fails first; the cause first."""

import io
import os
import shlex
from pathlib import Path

import pytest
from command_line import Done, samestep
from rich.console import Console
from runs import llama_folder, write_rows

from samestep.audit.report import print_report
from samestep.cli import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert main(["check", "--init", str(tmp_path / "loop.py")]) == 0
    return tmp_path


def without(package: str, *arguments: str, folder: Path) -> Done:
    """The command where a package is not installed."""
    fake = folder / "fake"
    fake.mkdir(exist_ok=True)
    text = f"raise ModuleNotFoundError('No module named {package}', name='{package}')\n"
    (fake / f"{package}.py").write_text(text, encoding="utf-8")
    path = os.pathsep.join([str(fake), os.environ.get("PYTHONPATH", "")])
    return samestep(*arguments, folder=folder, PYTHONPATH=path)


STUDY = ["--model", "tiny", "--data", "rows.jsonl", "--eval-data", "rows.jsonl", "--steps", "1"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("package", ["altair", "jinja2", "vl_convert"])
@pytest.mark.parametrize("command", ["check", "study"])
def test_a_missing_extra_is_said_before_the_work(folder: Path, package: str, command: str) -> None:
    started = folder / "started"
    loop = folder / "loop.py"
    loop.write_text(f"open({str(started)!r}, 'w')\n{loop.read_text('utf-8')}", encoding="utf-8")
    work = ["loop.py", "--html", "page.html"] if command == "check" else [*STUDY, "--out", "out"]
    done = without(package, command, *work, folder=folder)
    assert done.code == 2
    assert f"needs {package}: pip install " in done.err
    assert not started.exists()
    assert not (folder / "out").exists()
    # The hint works: it names the index's package, or a folder that defines the extra.
    source = shlex.split(done.err.strip().rpartition("pip install ")[2])[-1]  # after -e, if any
    name, _, extra = source.removesuffix("]").rpartition("[")
    assert extra == "report"
    project = Path(name) / "pyproject.toml"
    assert name == "samestep" or "\nreport = [" in project.read_text("utf-8")


def test_a_missing_tracker_is_said_before_the_work(folder: Path) -> None:
    llama_folder(folder / "tiny")
    write_rows(folder / "rows.jsonl", 4)
    run = ["--model", "tiny", "--data", "rows.jsonl", "--out", "out", "--track", "wandb"]
    done = without("wandb", "train", *run, folder=folder)
    assert done.code == 2
    assert "track needs wandb: pip install " in done.err
    assert not (folder / "out").exists()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("flag", ["--json", "--html"])
def test_a_report_that_cannot_be_written_is_said_before_the_work(folder: Path, flag: str) -> None:
    (folder / "file").touch()
    loop = folder / "loop.py"
    loop.write_text(f"raise SystemExit('ran')\n{loop.read_text('utf-8')}", encoding="utf-8")
    done = samestep("check", "loop.py", flag, "file/report", folder=folder)
    assert done.code == 2
    assert f"{flag} file/report: " in done.err
    assert "ran" not in done.err


def test_the_cause_comes_first_and_skipped_axes_share_a_line(folder: Path) -> None:
    done = samestep("check", "loop.py", folder=folder)
    assert done.code == 1, done.err
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("loop: inexact")
    assert "mean-of-means" in lines[1]
    table = next(at for at, line in enumerate(lines) if line.startswith("axis "))
    assert table > 1
    skipped = next(line for line in lines if line.startswith("skipped: "))
    assert skipped.startswith(
        "skipped: packing, short-window, next-step, knobs, loader, terms, ranks"
    )
    assert "packing skipped" not in done.out
    verbose = samestep("check", "loop.py", "--verbose", folder=folder)
    assert "packing skipped: the subject has no pack" in verbose.out


AXIS = {
    "ratio": 1.234567,
    "cosine": 0.123456,
    "relative_difference": 1e-3,
    "noise_floor": 1e-16,
    "advice": "Divide once.",
    "reason": "1 x 8 against 8 x 1",
    "evidence": "",
    "worst": [],
    "verdict": "inexact",
}


@pytest.mark.parametrize("cause", ["padding-mean-of-means", "a-cause-of-a-long-name-of-36-letters"])
def test_no_name_is_broken_at_80_columns(cause: str) -> None:
    names = ["evaluation-first", "my-own-axis-of-some-length"]
    report = {
        "subject": "loop",
        "verdict": "inexact",
        "examples": 8,
        "dtype": "float64",
        "axes": [{**AXIS, "name": name, "cause": cause} for name in names],
    }
    console = Console(width=80, record=True, file=io.StringIO())
    print_report(report, console)
    lines = console.export_text().splitlines()
    for name in names:
        assert any(line.startswith(name) and line.rstrip().endswith(cause) for line in lines)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("place", ["at import", "in the step"])
def test_an_error_of_the_subject_shows_its_own_line(folder: Path, place: str) -> None:
    loop = folder / "loop.py"
    text = loop.read_text("utf-8")
    if place == "at import":
        text += "\n\ndef helper():\n    return {}['nope']\n\n\nhelper()\n"
    else:
        text = text.replace("def step(", "def helper():\n    return {}['nope']\n\n\ndef step(")
        head, _, tail = text.partition("def step(")
        signature, _, body = tail.partition("\n")
        text = f"{head}def step({signature}\n    helper()\n{body}"
    loop.write_text(text, encoding="utf-8")
    done = samestep("check", "loop.py", folder=folder)
    assert done.code == 2
    assert "KeyError: 'nope'" in done.err
    assert "in helper: return {}['nope']" in done.err
    assert f"{loop}:" in done.err
    assert "Traceback" not in done.err
    debug = samestep("check", "loop.py", "--debug", folder=folder)
    assert "Traceback" in debug.err
    assert "in helper" in debug.err
