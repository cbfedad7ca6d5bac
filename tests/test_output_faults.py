"""Streams that cannot take what a command says: full, or of few characters."""

import io
import os
import sys
from typing import Any

import pytest

from samestep import cli


class FullFile(io.RawIOBase):
    """A file on a full disk."""

    def writable(self) -> bool:
        return True

    full = True

    def write(self, data: Any) -> int:
        if self.full:
            raise OSError(28, "No space left on device")
        return len(data)

    def fileno(self) -> int:
        raise io.UnsupportedOperation


@pytest.mark.parametrize("long", [False, True])
def test_a_full_stdout_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], long: bool
) -> None:
    def run(*_: object) -> int:
        print("done" * (9999 if long else 1))
        return 0

    monkeypatch.setattr(cli, "_run", run)
    file = FullFile()
    stream = io.TextIOWrapper(io.BufferedWriter(file, 100), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main(["train"]) == cli.FAILED
    error = capsys.readouterr().err
    assert error == "samestep: error: the output cannot be written (No space left on device)\n"
    file.full = False


def test_another_file_that_is_full_is_not_taken_for_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli, "_run", run)
    with pytest.raises(OSError, match="No space left"):
        cli.main(["train"])


def test_what_stdout_cannot_encode_is_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> int:
        print("model in /tmp/日本")
        return 0

    monkeypatch.setattr(cli, "_run", run)
    taken = io.BytesIO()
    stream = io.TextIOWrapper(taken, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main(["train"]) == 0
    assert taken.getvalue().decode() == "model in /tmp/\\u65e5\\u672c" + os.linesep
