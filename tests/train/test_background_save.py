"""Checkpoints written beside the steps: the same files, of the step that they are named after.

The CPU counts as an accelerator here. What a kill leaves is tested on the writing itself, which is
the same function (`test_checkpoint_faults.py`).
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import read_lines, run_config
from safetensors.torch import load_file

from samestep.errors import CheckpointError, NotFiniteError
from samestep.train import checkpoint, saver, trainer
from samestep.train.background_save import BackgroundSave
from samestep.train.trainer import train

NAME = "samestep-save"


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(saver, "saves_in_background", lambda device: True)
    yield
    assert NAME not in [one.name for one in threading.enumerate()]


Save = Callable[..., Path]


def around_save(monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Save, int], Save]) -> list[str]:
    """Each save inside a function of (the save, its step); the names of the threads that saved."""
    save, threads = checkpoint.save, []

    def wrapped(*args: Any, **kwargs: Any) -> Path:
        threads.append(threading.current_thread().name)
        return wrap(save, kwargs["progress"].step)(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", wrapped)
    return threads


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in (folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_what_is_written_is_the_step_that_it_is_named_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped = threading.Event()
    after = trainer.UpdateWatch.after_step

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = after(self, *args, **kwargs)
        stepped.set()
        return found

    def late(save: Save, step: int) -> Save:
        def write(*args: Any, **kwargs: Any) -> Path:
            if threading.current_thread().name == NAME:
                assert step == 6 or stepped.wait(20)  # the weights have gone on
            return save(*args, **kwargs)

        return write

    threads = around_save(monkeypatch, late)
    begin = BackgroundSave.begin

    def begun(self: BackgroundSave, save: Any) -> None:
        stepped.clear()
        begin(self, save)

    monkeypatch.setattr(BackgroundSave, "begin", begun)
    monkeypatch.setattr(trainer.UpdateWatch, "after_step", noted)
    train(run_config(tmp_path, save_every=1, keep=9))
    assert threads == [NAME] * 6
    monkeypatch.undo()
    train(run_config(tmp_path, save_every=1, keep=9, out=str(tmp_path / "plain")))
    for step in range(1, 7):
        one, other = tensors(tmp_path / "out", step), tensors(tmp_path / "plain", step)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_save_that_fails_ends_the_run_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(save: Save, step: int) -> Save:
        def write(*args: Any, **kwargs: Any) -> Path:
            if step == 2:
                raise CheckpointError("no space left")
            return save(*args, **kwargs)

        return write

    around_save(monkeypatch, full)
    with pytest.raises(CheckpointError, match="no space left"):
        train(run_config(tmp_path, save_every=1))
    assert len(read_lines(tmp_path / "out" / "log.jsonl")) <= 3
    assert checkpoint.newest_intact(tmp_path / "out" / "checkpoints").name == "step-00000001"  # type: ignore[union-attr]


@pytest.mark.parametrize("fails", [False, True])
def test_an_exit_waits_for_what_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fails: bool,
) -> None:
    """The error of the run is what is raised; that of the save is said beside it."""
    go = threading.Event()

    def slow(save: Save, step: int) -> Save:
        def write(*args: Any, **kwargs: Any) -> Path:
            assert go.wait(20)
            if fails:
                raise CheckpointError("no space left")
            return save(*args, **kwargs)

        return write

    around_save(monkeypatch, slow)
    step, done = trainer.step, []

    def breaks(*args: Any, **kwargs: Any) -> Any:
        done.append(1)
        if len(done) == 2:
            threading.Timer(0.2, go.set).start()
            raise NotFiniteError("the loss is nan")
        return step(*args, **kwargs)

    monkeypatch.setattr(trainer, "step", breaks)
    monkeypatch.setattr(trainer, "find_nonfinite_rows", lambda *_, **__: [])
    with pytest.raises(NotFiniteError, match="the loss is nan"):
        train(run_config(tmp_path, save_every=1))
    found = checkpoint.newest_intact(tmp_path / "out" / "checkpoints")
    assert (found is None) == fails
    assert ("no space left" in caplog.text) == fails
