import builtins
from pathlib import Path

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
    with pytest.raises(ConfigError, match=r"wandb.*samestep\[track\]"):
        open_trackers(["wandb"], folder=tmp_path, run="r", config={})
