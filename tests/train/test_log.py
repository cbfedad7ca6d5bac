import builtins
import os
from pathlib import Path
from typing import Any

import pytest
from runs import read_lines

from samestep.errors import ConfigError
from samestep.train.log import JsonLines, keep_steps, open_trackers


def test_a_resumed_log_drops_later_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = JsonLines(path)
    for step in (1, 2, 3):
        lines.write({"step": step})
    lines.close()
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')
    keep_steps(path, 2)
    assert [line["step"] for line in read_lines(path)] == [1, 2]


@pytest.mark.parametrize(
    "damage",
    [b'{"step": 2', b"\xff\xfe\x00}", b'"step"}', b"[1]", b'{"step": "2"}', b"[" * 5000 + b"}"],
)
def test_damaged_lines_are_left_out_and_named(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    keep_steps(path, 3)
    assert [line["step"] for line in read_lines(path)] == [1, 3]
    assert "1 damaged lines are left out (line 2)" in caplog.text


def test_a_line_that_does_not_fit_is_not_written_by_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Small:
        """A disk that takes a few bytes of the second line."""

        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 15

        def write(self, content: bytes) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            taken = int(self.file.write(content[: self.room]))
            self.room -= taken
            return taken

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    lines = JsonLines(tmp_path / "log.jsonl")
    monkeypatch.setattr(lines, "_file", Small(lines._file))
    lines.write({"step": 1})
    with pytest.raises(OSError, match="No space left"):
        lines.write({"step": 2})
    lines.close()
    assert (tmp_path / "log.jsonl").read_bytes() == b'{"step": 1}\n'


def test_a_pipe_in_the_place_of_a_log_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(OSError, match="not a regular file"):
        keep_steps(tmp_path / "log.jsonl", 3)
    with pytest.raises(OSError, match="is a pipe"):
        JsonLines(tmp_path / "log.jsonl")


def test_no_log_yet_is_fine(tmp_path: Path) -> None:
    keep_steps(tmp_path / "log.jsonl", 3)


def test_tensorboard_writes_events(tmp_path: Path) -> None:
    (tracker,) = open_trackers(["tensorboard"], folder=tmp_path, run="r", config={"lr": 1})
    tracker.write(1, {"train/loss": 2.0})
    tracker.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_wandb(name: str, *rest: object) -> object:
        if name == "wandb":
            raise ImportError("No module named 'wandb'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_wandb)
    with pytest.raises(ConfigError, match=r"wandb.*\[track\]"):
        open_trackers(["wandb"], folder=tmp_path, run="r", config={})
