"""The last checkpoint of a run: beside the export, or not at all where it would be deleted at once.

The CPU counts as an accelerator here, as in `test_background_save.py`.
"""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import llama_folder, read_lines, run_config, write_rows
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from samestep.errors import CheckpointError, Interrupted
from samestep.train import checkpoint, saver, summary, trainer
from samestep.train.trainer import train

NAME = "samestep-save"


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "saves_in_background", lambda device: True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("last")
    llama_folder(folder / "tiny")
    write_rows(folder / "rows.jsonl", 20)
    return folder


@pytest.fixture(scope="module")
def whole(files: Path) -> dict[str, torch.Tensor]:
    """The model of a run that nothing has stopped."""
    run(files, files / "whole")
    return load_file(files / "whole" / "model" / "model.safetensors")


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """The step and the thread of each save."""
    save, found = checkpoint.save, []

    def noted(*args: Any, **kwargs: Any) -> Path:
        found.append((kwargs["progress"].step, threading.current_thread().name))
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", noted)
    return found


def run(files: Path, out: Path, **changes: Any) -> Any:
    settings = {"model": str(files / "tiny"), "data": str(files / "rows.jsonl"), "steps": 3}
    return train(run_config(files, out=str(out), **{**settings, **changes}))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize(("keep", "copies"), [(2, 3), (0, 0)])
def test_bytes_that_a_run_of_three_steps_writes(
    files: Path, tmp_path: Path, saves: list[tuple[int, str]], keep: int, copies: int
) -> None:
    """The model once, and weights and two moments once, or not at all."""
    run(files, tmp_path / "out", keep=keep)
    assert saves == [(3, NAME)] * (keep > 0)  # so all that was written is still there
    weights = size(files / "tiny")
    assert size(tmp_path / "out") == pytest.approx(weights * (1 + copies), rel=0.05)


def test_the_last_one_is_written_while_the_model_is(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the weights themselves: nothing changes them any more."""
    exported, copied = threading.Event(), []
    save, export, snapshot = checkpoint.save, trainer.save_model, saver.snapshot

    def late(*args: Any, **kwargs: Any) -> Path:
        assert exported.wait(20)
        return save(*args, **kwargs)

    def noted(*args: Any, **kwargs: Any) -> None:
        export(*args, **kwargs)
        exported.set()

    monkeypatch.setattr(checkpoint, "save", late)
    monkeypatch.setattr(trainer, "save_model", noted)
    monkeypatch.setattr(saver, "snapshot", lambda *both: copied.append(both) or snapshot(*both))
    run(files, tmp_path / "out")
    assert not copied
    assert checkpoint.newest_intact(tmp_path / "out" / "checkpoints").name == "step-00000003"  # type: ignore[union-attr]
    assert (tmp_path / "out" / "summary.json").is_file()


@pytest.mark.parametrize(
    ("changes", "keep"),
    [({"ema": 0.5}, 0), ({"lora_rank": 2, "merge": True}, 1)],
    ids=["average", "merge"],
)
def test_where_the_export_changes_weights_a_copy_of_them_is_written(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    keep: int,
) -> None:
    held: dict[str, torch.Tensor] = {}
    remove = trainer.remove_checkpoints

    def read(folder: Path) -> dict[str, torch.Tensor]:
        parts = [load_file(file) for file in sorted(folder.glob("step-00000003/*.safetensors"))]
        return {name: tensor for part in parts for name, tensor in part.items()}

    def noted(folder: Path) -> None:
        held.update(read(folder))
        remove(folder)

    monkeypatch.setattr(trainer, "remove_checkpoints", noted)
    run(files, tmp_path / "out", keep=keep, **changes)
    found = held or read(tmp_path / "out" / "checkpoints")
    monkeypatch.undo()
    run(files, tmp_path / "plain", keep=1, **changes)  # written before the export
    wanted = read(tmp_path / "plain" / "checkpoints")
    assert found.keys() == wanted.keys() != set()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert (tmp_path / "out" / "checkpoints").exists() == (keep > 0)


@pytest.mark.parametrize("at", ["save_pretrained", "signal", "summary.json", "before it"])
def test_an_export_that_fails_gets_the_checkpoint_that_was_left_out(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saves: list[tuple[int, str]],
    whole: dict[str, torch.Tensor],
    at: str,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def stopped(*_: Any, **__: Any) -> None:
        raise Interrupted(15)

    with monkeypatch.context() as patch:
        if at == "save_pretrained":
            patch.setattr(LlamaForCausalLM, "save_pretrained", full)
        elif at == "signal":
            patch.setattr(trainer, "save_model", stopped)
        elif at == "before it":  # as the files of the log are closed
            leave = trainer.RunReporter.__exit__
            patch.setattr(
                trainer.RunReporter, "__exit__", lambda *error: leave(*error) or stopped()
            )
        else:
            patch.setattr(summary, "write_atomically", full)
        with pytest.raises(CheckpointError if "save" in at or "json" in at else Interrupted):
            run(files, tmp_path / "out", keep=0)
    assert saves == [(3, "MainThread")]
    if at in ("signal", "before it"):
        return  # what was saved is the same
    run(files, tmp_path / "out", keep=0, resume=True)
    assert len(read_lines(tmp_path / "out" / "log.jsonl")) == 3
    assert not (tmp_path / "out" / "checkpoints").exists()
    found = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in whole.items())


@pytest.mark.parametrize("keep", [0, 2])
def test_weights_that_are_not_finite_are_not_exported(
    files: Path, tmp_path: Path, keep: int
) -> None:
    with pytest.raises(CheckpointError, match="are not finite"):
        run(files, tmp_path / "out", keep=keep, steps=1, weight_decay=1e300)
    assert not (tmp_path / "out" / "model").exists()


def test_a_last_one_that_cannot_be_written_ends_the_run_beside_its_model(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Path:
        raise CheckpointError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        with pytest.raises(CheckpointError, match="no space left"):
            run(files, tmp_path / "out")
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "summary.json").exists()
    run(files, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "summary.json").is_file()
