"""What a step leaves, what moves between micro-batches, and whose an error is."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from samestep.audit.adapters.trainer_data import select_rows, stand_in_for
from samestep.audit.axes.axis import Axis
from samestep.audit.check import CheckReport, check
from samestep.audit.experiments import Experiments
from samestep.errors import CheckError

LENGTHS = (5, 17, 3, 9, 12, 4, 21, 7)


class Loop:
    """A sound loop; what else it does comes in `between` and `after`."""

    examples = tuple((torch.arange(n) * 7 + 3 * n) % 47 + 1 for n in LENGTHS)
    kind: Any = torch.optim.SGD

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(50, 8), nn.BatchNorm1d(8).eval(), nn.Linear(8, 50))

    def collate(self, rows: list[Tensor]) -> dict[str, Tensor]:
        pad = nn.utils.rnn.pad_sequence
        labels = pad(rows, batch_first=True, padding_value=-100)
        return {"input_ids": pad(rows, batch_first=True), "labels": labels}

    def between(self, model: nn.Module, optimizer: Any) -> None:
        """After each micro-batch."""

    def after(self, model: nn.Module, optimizer: Any) -> None:
        """After the update."""

    def train(self, model: nn.Module, micros: list[Any]) -> None:
        optimizer = self.kind(model.parameters(), lr=0.05)
        total = sum((micro["labels"][:, 1:] != -100).sum() for micro in micros)
        for micro in micros:
            hidden = model[0](micro["input_ids"])[:, :-1]
            logits = model[2](hidden * model[1].running_var).flatten(0, 1)
            targets = micro["labels"][:, 1:].flatten()
            (functional.cross_entropy(logits, targets, reduction="sum") / total).backward()
            self.between(model, optimizer)
        optimizer.step()
        self.after(model, optimizer)


class BufferMoves(Loop):
    def between(self, model: nn.Module, optimizer: Any) -> None:
        model[1].running_var.mul_(0.9)


class RateMoves(Loop):
    def between(self, model: nn.Module, optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] *= 0.9


class AllMoveOnce(Loop):
    kind = torch.optim.AdamW

    def after(self, model: nn.Module, optimizer: Any) -> None:
        model[1].running_var.mul_(0.9)
        optimizer.param_groups[0]["lr"] *= 0.9


class Counted(Loop):
    """Counts its steps over all runs, where the audit puts nothing back."""

    steps: ClassVar[list[object]] = []

    def __init__(self) -> None:
        type(self).steps = [object()]

    def train(self, model: nn.Module, micros: list[Any]) -> None:
        type(self).steps.append(object())
        super().train(model, micros)


class ClearsBefore(Counted):
    def train(self, model: nn.Module, micros: list[Any]) -> None:
        model.zero_grad()
        super().train(model, micros)


class ClearsAfter(Counted):
    def after(self, model: nn.Module, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


class BySigns(Loop):
    """Every rounding of a gradient that is zero would turn its sign: sound all the same."""

    kind = torch.optim.Rprop


def micro_batch(loop: type[Loop]) -> Any:
    return check(loop, axes=["micro-batch"]).axes[0]


@pytest.mark.parametrize(
    ("loop", "moved"), [(BufferMoves, "1.running_var"), (RateMoves, "the learning rate")]
)
def test_what_moves_once_a_micro_batch_is_named(loop: type[Loop], moved: str) -> None:
    axis = micro_batch(loop)
    assert axis.cause == "state-per-micro-batch"
    assert moved in axis.evidence


@pytest.mark.parametrize("loop", [Loop, AllMoveOnce, BySigns])
def test_what_moves_once_a_step_is_sound(loop: type[Loop]) -> None:
    assert micro_batch(loop).verdict == "exact"


def test_steps_that_leave_no_gradient_are_not_run_again_with_them_emptied() -> None:
    for loop in (ClearsBefore, ClearsAfter):
        assert check(loop, axes=["next-step"]).axes[0].verdict == "exact"
    assert len(ClearsAfter.steps) == len(ClearsBefore.steps) - 4  # two in a row, whole and split


def broken(experiments: Experiments) -> Any:
    raise ZeroDivisionError("of the audit")


def test_an_error_of_the_audit_is_not_blamed_on_the_subject() -> None:
    report: CheckReport = check(Loop, axes=[Axis("broken", "nothing", broken), "order"])
    first, second = report.axes
    assert "no fault of the subject's" in first.reason
    assert second.verdict == "exact"


class CannotCollate(Loop):
    def collate(self, rows: list[Tensor]) -> dict[str, Tensor]:
        raise ValueError("of the loop")


def test_whose_error_it_is_is_said_of_the_first_batches_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(CheckError, match="the subject failed: ValueError: of the loop"):
        check(CannotCollate, axes=["order"])
    monkeypatch.setattr("samestep.audit.adapters.loop.token_length", int)
    with pytest.raises(CheckError, match="no fault of the subject's"):
        check(Loop, axes=["order"])


class Collate:
    columns = ("labels",)

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, rows: list[int]) -> list[int]:
        self.calls += 1
        return rows


def test_a_stand_in_keeps_type_attributes_and_what_calls_set() -> None:
    own = Collate()
    stand_in = stand_in_for(own, lambda rows: [*own(rows), 0])
    assert isinstance(stand_in, Collate)
    assert stand_in.columns == ("labels",)
    assert stand_in([1]) == [1, 0]
    assert stand_in.calls == own.calls == 1


def test_a_stand_in_for_a_function_is_one() -> None:
    def collate(rows: list[int]) -> list[int]:
        return rows

    stand_in = stand_in_for(collate, lambda rows: [*rows, 0])
    assert stand_in.__name__ == "collate"
    assert stand_in([1]) == [1, 0]


class Rows(torch.utils.data.Dataset[int]):
    column_names = ("input_ids",)

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> int:
        return index


def test_some_rows_of_a_dataset_keep_its_attributes() -> None:
    rows = select_rows(Rows(), [3, 1])
    assert rows.column_names == ("input_ids",)
    assert [rows[0], rows[1]] == [3, 1]
    assert select_rows([5, 6, 7], [2, 0]) == [7, 5]
