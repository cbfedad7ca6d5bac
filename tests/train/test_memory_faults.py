"""Memory that runs out after the backward: in clipping, in the update, in a save, at the export."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import read_lines, run_config
from safetensors.torch import load_file
from torch.optim import AdamW, Optimizer

from samestep.engine import oom, step
from samestep.engine.oom import update_guard
from samestep.errors import CheckpointError, OutOfMemoryError, StepError
from samestep.train import checkpoint, model_folder, shards
from samestep.train.progress import DataFingerprint, Progress
from samestep.train.trainer import train

FULL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
COMMON: dict[str, Any] = {"precision": "float64", "steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    train(run_config(folder, out=str(folder / "whole"), **COMMON))
    return folder


class Failing:
    """Runs out of memory in some of its calls, before it does anything."""

    def __init__(self, real: Any, *, times: int) -> None:
        self.real, self.times, self.failures = real, times, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self.failures < self.times:
            self.failures += 1
            raise RuntimeError(FULL)
        return self.real(*arguments, **options)


@pytest.mark.parametrize("place", ["clipping", "update"])
def test_the_same_step_is_run_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    module, name = (step, "clip_grad_norm_") if place == "clipping" else (AdamW, "_init_group")
    failing = Failing(getattr(module, name), times=1)
    monkeypatch.setattr(module, name, lambda *given, **options: failing(*given, **options))
    train(run_config(folder, out=str(folder / place), **COMMON))
    assert (
        f"out of memory in {'clipping the gradient' if place == 'clipping' else 'the update'}"
        in (caplog.text)
    )
    assert failing.failures == 1
    found, wanted = (
        load_file(folder / out / "model" / "model.safetensors") for out in (place, "whole")
    )
    assert max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted) < 1e-12
    assert len(read_lines(folder / place / "log.jsonl")) == 2


def test_twice_is_an_error_that_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(None, times=99)
    monkeypatch.setattr(step, "clip_grad_norm_", failing)
    with pytest.raises(OutOfMemoryError, match=r"nothing was updated.*do not fit"):
        train(run_config(folder, out=str(folder / "twice"), **COMMON))
    assert failing.failures == 2


def optimizer_of_two() -> tuple[list[torch.nn.Parameter], Optimizer]:
    weights = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    return weights, AdamW(weights, lr=0.1, foreach=False)


def test_state_that_an_update_had_begun_is_taken_back() -> None:
    """Without that the next update would take half of a weight's state for all of it."""
    weights, optimizer = optimizer_of_two()

    def begin() -> None:
        optimizer.state[weights[0]]["step"] = torch.zeros(())
        raise MemoryError

    with pytest.raises(OutOfMemoryError) as failed, update_guard(weights, optimizer):
        begin()
    assert failed.value.after_backward
    assert not optimizer.state[weights[0]]
    optimizer.step()
    alone, other = optimizer_of_two()
    other.step()
    assert torch.equal(weights[0], alone[0])


@pytest.mark.parametrize("what", ["weight", "moment"])
def test_an_update_that_ended_in_the_middle_is_no_step(what: str) -> None:
    weights, optimizer = optimizer_of_two()
    optimizer.step()
    changed = weights[1] if what == "weight" else optimizer.state[weights[1]]["step"]

    def change() -> None:
        with torch.no_grad():
            changed.add_(1)
        raise RuntimeError(FULL)

    with (
        pytest.raises(StepError, match="in the middle of the update") as failed,
        update_guard(weights, optimizer),
    ):
        change()
    assert not isinstance(failed.value, OutOfMemoryError)  # nobody may run that step again


def test_another_error_of_an_update_stays_what_it_is() -> None:
    weights, optimizer = optimizer_of_two()
    with pytest.raises(RuntimeError, match="shapes"), update_guard(weights, optimizer):
        raise RuntimeError("shapes do not fit")
    assert not oom.is_out_of_memory(RuntimeError("shapes do not fit"))


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError(FULL), RuntimeError("PyObject pointer is null")], ids=repr
)
def test_memory_that_runs_out_in_a_save_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    model = torch.nn.Linear(2, 2)
    optimizer = AdamW(model.parameters())
    data = DataFingerprint(fingerprint="a", records=1, tokens=1, blocks=["b"])
    progress = Progress(step=1, tokens=0, seconds=0.0, skipped=0, data=data)
    monkeypatch.setattr(shards.HuggingFaceStorageWriter, "write_data", fail)
    place = folder / type(error).__name__ / str(len(str(error)))
    with pytest.raises(CheckpointError, match=r"could not be written: out of memory for the copy"):
        checkpoint.save(place, model, optimizer=optimizer, progress=progress, keep=1)
    assert not list(place.iterdir())


def test_memory_that_runs_out_at_the_export_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model:
        def save_pretrained(self, *_: Any, **__: Any) -> None:
            raise MemoryError

    with pytest.raises(CheckpointError, match=r"could not be written: out of memory.*is intact"):
        model_folder.save_model(Model(), None, folder=folder / "export" / "model", merge=False)
    assert not (folder / "export" / "model").exists()
