"""Micro-batches made ahead, in the background: the same steps, and a thread that always ends."""

import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import read_lines, run_config
from safetensors.torch import load_file

from samestep.errors import DataError, Interrupted, OutOfMemoryError
from samestep.train import micro_batches, trainer
from samestep.train.ahead import Ahead
from samestep.train.micro_batches import MicroBatches
from samestep.train.recipes.language import CausalLMRecipe
from samestep.train.trainer import train

NAME = "samestep-ahead"


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CPU counts as free meanwhile; and no thread may be left."""
    monkeypatch.setattr(micro_batches, "leaves_cpu_free", lambda device: True)
    yield
    assert not [one for one in threading.enumerate() if one.name.startswith(NAME)]


@pytest.fixture
def makers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of the thread that made each micro-batch."""
    made: list[str] = []
    collate = CausalLMRecipe.collate

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(threading.current_thread().name)
        return collate(self, *args, **kwargs)

    monkeypatch.setattr(CausalLMRecipe, "collate", noted)
    return made


def test_every_step_but_the_first_is_made_ahead_and_nothing_changes(
    tmp_path: Path, makers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(run_config(tmp_path, micro_batch=3, eval_data=str(tmp_path / "rows.jsonl")))
    ahead = [name for name in makers if name.startswith(NAME)]
    steps = read_lines(tmp_path / "out" / "log.jsonl")
    assert len(ahead) == sum(line["micro_batches"] for line in steps if "grad_norm" in line) - 3
    monkeypatch.setattr(micro_batches, "leaves_cpu_free", lambda device: False)
    number = len(makers)
    train(run_config(tmp_path, micro_batch=3, out=str(tmp_path / "plain")))
    assert NAME not in "".join(makers[number:])
    one, other = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("out", "plain")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_budget_that_shrinks_makes_them_anew(tmp_path: Path, makers: list[str]) -> None:
    """What was made for the larger budget is not used."""
    settings = run_config(tmp_path)
    found = trainer.set_up(settings).micro_batches
    with found.made_ahead():
        found.prepare(range(8), 3)
        found.halve(range(8))
        fine = list(found.batches(range(8), 3))
        assert len(fine) > 1
        found.prepare(range(8), 3)
        again = list(found.batches(range(8), 3))
    assert makers[-1].startswith(NAME)
    assert [one["example_ids"].tolist() for one in fine] == [
        one["example_ids"].tolist() for one in again
    ]
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(fine, again, strict=True)
    )


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The third step's micro-batches cannot be made."""
    collate = MicroBatches._collated

    def broken(self: Any, indices: Any, step: int) -> Any:
        if step == 2:
            raise error
        return collate(self, indices, step)

    monkeypatch.setattr(MicroBatches, "_collated", broken)


def test_an_error_comes_at_the_step_that_it_belongs_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, DataError("image 7 cannot be read"))
    with pytest.raises(DataError, match="image 7"):
        train(run_config(tmp_path))
    assert len(read_lines(tmp_path / "out" / "log.jsonl")) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])
def test_the_thread_ends_with_every_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, times: int
) -> None:
    begun = threading.Event()
    collate = MicroBatches._collated

    def signalling(self: Any, indices: Any, step: int) -> Any:
        if step == 2:
            begun.set()
        return collate(self, indices, step)

    monkeypatch.setattr(MicroBatches, "_collated", signalling)
    key = trainer.key_dropout

    def stop(*args: Any, step: int, **kwargs: Any) -> None:
        if step == 1 and begun.wait(10):
            for _ in range(times):
                signal.raise_signal(number)
        key(*args, step=step, **kwargs)

    monkeypatch.setattr(trainer, "key_dropout", stop)
    with pytest.raises(Interrupted):
        train(run_config(tmp_path, micro_batch=2))


def test_an_exit_waits_for_one_micro_batch_at_most() -> None:
    ahead, going, go = Ahead(), threading.Event(), threading.Event()
    made: list[int] = []

    def part(number: int) -> dict[str, Any]:
        going.set()
        assert go.wait(10)
        made.append(number)
        return {}

    def fails() -> None:
        with ahead.running():
            ahead.start("a", [partial(part, at) for at in range(100)])
            assert going.wait(10)
            threading.Timer(0.05, go.set).start()
            raise OutOfMemoryError("stop")

    with pytest.raises(OutOfMemoryError):
        fails()
    assert made == [0]
    ahead.start("b", [dict])
    assert ahead.take("b") is None  # outside of the block nothing is begun
