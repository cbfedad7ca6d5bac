"""Micro-batches made ahead, in the background: the same steps, and a thread that always ends."""

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from cases import ragged
from runs import read_lines, run_config
from safetensors.torch import load_file

from samestep.data.examples import Examples
from samestep.data.records import Records
from samestep.engine.device_copy import copy_without_waiting
from samestep.engine.parallel import Idle
from samestep.errors import DataError, Interrupted, OutOfMemoryError
from samestep.train import micro_batches, trainer
from samestep.train.ahead import Ahead, pinned
from samestep.train.micro_batches import MicroBatches
from samestep.train.recipes.language import CausalLMRecipe
from samestep.train.setup import set_up
from samestep.train.trainer import train

NAME = "samestep-ahead"


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CPU counts as free meanwhile; and no thread may be left."""
    monkeypatch.setattr(micro_batches, "leaves_cpu_free", lambda device: True)
    yield
    assert not [one for one in threading.enumerate() if one.name.startswith(NAME)]


Made: TypeAlias = list[tuple[bool, int, tuple[int, ...]]]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """Whether the thread made each micro-batch, its step, and its records."""
    found: Made = []
    collate = CausalLMRecipe.collate

    def noted(self: Any, records: Any, indices: Any, *, key: tuple[int, int], **rest: Any) -> Any:
        ahead = threading.current_thread().name.startswith(NAME)
        found.append((ahead, key[1], tuple(indices)))
        return collate(self, records, indices, key=key, **rest)

    monkeypatch.setattr(CausalLMRecipe, "collate", noted)
    return found


@pytest.mark.parametrize("changes", [{}, {"bitwise": True}], ids=["rows dealt", "packs dealt"])
def test_every_step_but_the_first_is_made_ahead_and_nothing_changes(
    tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    train(run_config(tmp_path, micro_batch=3, **changes))
    lines = [line for line in read_lines(tmp_path / "out" / "log.jsonl") if "grad_norm" in line]
    by_thread = [each for each in made if each[0]]
    assert {step for ahead, step, _ in made if not ahead} == {0}
    assert len(by_thread) == len(set(by_thread))
    assert len(by_thread) == sum(line["micro_batches"] for line in lines[1:])
    monkeypatch.setattr(micro_batches, "leaves_cpu_free", lambda device: False)
    number = len(made)
    train(run_config(tmp_path, micro_batch=3, out=str(tmp_path / "plain"), **changes))
    assert not any(ahead for ahead, *_ in made[number:])
    one, other = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("out", "plain")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("whole_packs", [False, True])
def test_a_rank_takes_what_it_has_begun(
    tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch, whole_packs: bool
) -> None:
    """Rank 1 of 2, also where it has no record of its own."""
    monkeypatch.setattr(micro_batches, "world_size", lambda: 2)
    monkeypatch.setattr(micro_batches, "rank", lambda: 1)
    setup = set_up(run_config(tmp_path))
    found = MicroBatches(
        setup.train,
        setup.collate,
        micro_tokens=200,
        padded=False,
        device=torch.device("cpu"),
        whole_packs=whole_packs,
    )
    made.clear()
    with found.made_ahead():
        for step, records in enumerate([range(8), range(3, 16), [5]]):
            found.prepare(records, step)
            run = list(found.of_this_rank(records, step))
            assert isinstance(run[0], Idle) is (len(records) == 1)
            assert len(run) == found.count(records)
    assert all(ahead for ahead, *_ in made)
    assert len(made) == len(set(made))


def test_a_budget_that_shrinks_makes_them_anew(tmp_path: Path, made: Made) -> None:
    """What was made for the larger budget is not used, and the following step is begun again."""
    found = set_up(run_config(tmp_path)).micro_batches
    made.clear()
    with found.made_ahead():
        found.prepare(range(8), 3)
        whole = list(found.of_this_rank(range(8), 3))
        found.prepare(range(8, 16), 4)
        found.halve(range(8))
        fine = list(found.of_this_rank(range(8), 3))
        assert len(fine) > len(whole)
        following = list(found.of_this_rank(range(8, 16), 4))
    assert [step for ahead, step, _ in made if not ahead] == [3] * len(fine)
    for micros, rows in ((fine, range(8)), (following, range(8, 16))):
        held = [row for micro in micros for row in micro["example_ids"].tolist()]
        assert sorted(held) == list(rows)


def test_records_of_another_data_set_are_not_taken_for_those_begun(
    tmp_path: Path, made: Made
) -> None:
    found = set_up(run_config(tmp_path)).micro_batches
    records = found._records
    with found.made_ahead():
        found.prepare(range(4), 3)
        found.put(records.with_fields({"mark": torch.arange(len(records))}), ())
        (micro,) = found.of_this_rank(range(4), 3)
    assert micro["fields"]["mark"].tolist() == micro["example_ids"].tolist()


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The third step's micro-batches cannot be made."""
    collate = CausalLMRecipe.collate

    def broken(*args: Any, key: tuple[int, int], **rest: Any) -> Any:
        if key[1] == 2:
            raise error
        return collate(*args, key=key, **rest)

    monkeypatch.setattr(CausalLMRecipe, "collate", broken)


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
    collate = CausalLMRecipe.collate

    def signalling(*args: Any, key: tuple[int, int], **rest: Any) -> Any:
        if key[1] == 2:
            begun.set()
        return collate(*args, key=key, **rest)

    monkeypatch.setattr(CausalLMRecipe, "collate", signalling)
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
    going, go = threading.Event(), threading.Event()
    made: list[int] = []

    def collate(records: Any, indices: Sequence[int], step: int) -> dict[str, Any]:
        going.set()
        assert go.wait(10)
        made.extend(indices)
        return {}

    ahead, records = Ahead(collate, torch.device("cpu")), Records(Examples.from_examples(ragged(4)))

    def fails() -> None:
        with ahead.running():
            ahead.begin([(records, (at,), 0) for at in range(100)])
            assert going.wait(10)
            threading.Timer(0.05, go.set).start()
            raise OutOfMemoryError("stop")

    with pytest.raises(OutOfMemoryError):
        fails()
    assert made == [0]
    ahead.begin([(records, (1,), 0)])  # outside of the block nothing is begun
    assert ahead.make((records, (2,), 0)) == {}
    assert made == [0, 2]


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_pins_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(self: torch.Tensor) -> torch.Tensor:
        raise AssertionError("pinned")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refused)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    micro, cpu = {"input_ids": torch.ones(1, 3), "fields": {"class": torch.ones(1)}}, "cpu"
    assert pinned(micro, torch.device(cpu)) is micro
    assert copy_without_waiting(micro["input_ids"], torch.device(cpu)) is micro["input_ids"]
    for pins in (pinned, copy_without_waiting):
        with pytest.raises(AssertionError, match="pinned"):
            pins(micro if pins is pinned else micro["input_ids"], torch.device("cuda"))
