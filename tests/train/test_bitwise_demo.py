"""The lines of docs/bitwise.md under "Two terminals", as they stand there."""

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from command_line import samestep
from runs import llama_folder, read_lines, write_rows

from samestep.train.command import read_settings
from samestep.train.trainer import train

PAGE = Path(__file__).parents[2] / "docs" / "bitwise.md"


def commands() -> list[str]:
    """The commands of the demo, without comments."""
    found = re.search(r"<!-- demo -->\n```bash\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert found is not None
    lines = found[1].replace("\\\n", " ").splitlines()
    return [line for line in lines if not line.startswith("#")]


def start(command: str, folder: Path) -> "subprocess.Popen[str]":
    name, *arguments = shlex.split(command)
    assert name == "samestep"
    return subprocess.Popen(
        [sys.executable, "-m", "samestep", *arguments],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def steps(log: Path) -> int:
    return log.read_bytes().count(b'"digest"') if log.exists() else 0


def kill_all(process: "subprocess.Popen[str]") -> None:
    """SIGKILL to the launcher and its ranks, as ``pkill -9 -f`` sends it."""
    parent = psutil.Process(process.pid)
    for each in [parent, *parent.children(recursive=True)]:
        each.kill()
    process.communicate()


@pytest.mark.slow
def test_killed_on_two_ranks_resumed_on_one_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama_folder(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", 20)
    first, kill, resume, verify = commands()
    assert kill == "pkill -9 -f runs/bits"
    log = tmp_path / "runs" / "bits" / "digests.jsonl"
    running = start(first, tmp_path)
    end = time.monotonic() + 240
    while steps(log) < 4 and running.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    kill_all(running)
    assert 4 <= steps(log) < 12
    resumed = samestep(*shlex.split(resume)[1:], folder=tmp_path)
    assert (resumed.code, "12 steps" in resumed.out) == (0, True), resumed.err
    verified = samestep(*shlex.split(verify)[1:], folder=tmp_path)
    assert verified.code == 0, verified.err
    said = verified.out
    assert "steps 1 to 12 of runs/bits are equal to the bit; replayed from the beginning" in said
    assert said.strip() in PAGE.read_text("utf-8").replace("`", "")

    monkeypatch.chdir(tmp_path)
    threads = read_settings(["runs/bits/config.yaml"]).threads
    arguments = [*shlex.split(first)[2:-2], "--threads", str(threads)]
    arguments[arguments.index("runs/bits")] = "runs/unbroken"
    train(read_settings(arguments))
    logs = [
        [line for line in read_lines(Path(out) / "digests.jsonl") if "digest" in line]
        for out in ("runs/bits", "runs/unbroken")
    ]
    assert logs[0] == logs[1]
