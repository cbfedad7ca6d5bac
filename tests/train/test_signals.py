"""SIGINT and SIGTERM, once and twice, where libraries wrap what is raised inside of them."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from runs import run_config

from samestep.cli import main
from samestep.errors import CheckpointError, Interrupted
from samestep.train import shards
from samestep.train.signals import stop_signals


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_block_however_a_library_wraps_it(number: int) -> None:
    said: list[str] = []

    def save() -> None:
        send(number)
        assert signals.number() == number
        try:
            send(number)
        except BaseException as error:
            raise CheckpointError("wrapped") from error

    with (
        pytest.raises(Interrupted) as stopped,
        stop_signals() as signals,
        signals.between_micro_batches(said.append),
    ):
        save()
    assert stopped.value.number == number
    assert len(said) == 1


def test_a_signal_that_a_library_swallows_counts_at_the_next_look() -> None:
    with stop_signals() as signals:
        with suppress(BaseException):
            send(signal.SIGTERM)
        with pytest.raises(Interrupted):
            signals.number()


def test_a_line_that_cannot_be_shown_ends_no_run(capfd: pytest.CaptureFixture[str]) -> None:
    """The signal may have come in the middle of an import of what shows the line."""

    def announce(_: str) -> None:
        raise ImportError("cannot import name 'EMOJI' from partially initialized module")

    with stop_signals() as signals, signals.between_micro_batches(announce):
        send(signal.SIGTERM)
        assert signals.number() == signal.SIGTERM
    assert "SIGTERM: stopping after this micro-batch" in capfd.readouterr().err


def test_outside_of_the_loop_the_first_signal_ends_at_once() -> None:
    with pytest.raises(Interrupted), stop_signals():
        send(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_errors_that_follow_no_signal_stay_as_they_are() -> None:
    with pytest.raises(CheckpointError), stop_signals():
        raise CheckpointError("a full disk")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_inside_a_save_has_the_exit_code_of_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run_config(tmp_path)
    writer = shards.HuggingFaceStorageWriter
    real = writer.write_data

    def interrupted(self: Any, *arguments: Any) -> Any:
        send(number)
        send(number)
        return real(self, *arguments)

    monkeypatch.setattr(writer, "write_data", interrupted)
    paths = ["--model", str(tmp_path / "tiny"), "--data", str(tmp_path / "rows.jsonl")]
    out = ["--out", str(tmp_path / "out")]
    assert main(["train", *paths, *out, "--steps", "1"]) == 128 + number


def lose_a_rank(*, signals_sent: int) -> None:
    """An error leaves the steps, and is looked into while the launcher ends what remains."""
    with stop_signals() as signals:
        try:
            with signals.between_micro_batches(lambda text: None):
                raise RuntimeError("Connection closed by peer")
        except RuntimeError:
            for _ in range(signals_sent):
                signal.raise_signal(signal.SIGTERM)
            raise CheckpointError("rank 1 died") from None


def test_a_first_signal_leaves_an_error_its_say() -> None:
    with pytest.raises(CheckpointError, match="rank 1 died"):
        lose_a_rank(signals_sent=1)


def test_a_second_signal_ends_the_run_while_an_error_is_told() -> None:
    with pytest.raises(Interrupted):
        lose_a_rank(signals_sent=2)
