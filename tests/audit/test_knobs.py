"""The axis of knobs: sizes that a subject declares, wherever they live."""

from typing import Any, ClassVar

import pytest
from kit import Case, Tiny, collate, nll, rows, targets
from knobs_and_loaders import CASES
from trainers import factory

from samestep.audit.check import check
from samestep.errors import CheckError

SEED = 5


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.axis == "knobs"], ids=lambda case: case.name
)
def test_a_knob_changes_nothing_or_is_named(case: Case) -> None:
    report = check(case.build(SEED), case.axes)
    found = {axis.name: axis.cause for axis in report.axes if axis.verdict == "inexact"}
    assert found.get("knobs") == case.cause
    assert {*found.values()} <= {case.cause, *case.also}


def loop(knobs: Any, **names: Any) -> dict[str, Any]:
    def step(model: Any, micros: list[Any], *, power: float = 1.0) -> None:
        for micro in micros:
            (nll(model, micro) / targets(micros) ** power).backward()

    base = {"model": Tiny, "examples": rows(SEED), "collate": collate, "step": step}
    return {**base, "knobs": knobs, **names}


def test_the_worst_value_is_said_and_one_that_fails_is_no_verdict() -> None:
    axis = check(loop({"power": (1.0, 0.5, "x", 2.0)}), ["knobs"]).axes[0]
    assert axis.verdict == "inexact"
    assert "power=0.5" in axis.reason
    assert "power='x': the subject failed: TypeError" in axis.reason


def test_every_wrong_declaration_is_said_at_once() -> None:
    with pytest.raises(CheckError) as caught:
        check(loop({"power": (), "speed": (1, 2)}), ["knobs"])
    assert "power: give a tuple of values" in str(caught.value)
    assert "speed: no function of the subject takes it" in str(caught.value)


def test_a_loop_without_knobs_is_not_passed() -> None:
    assert check(loop(None), ["knobs"]).axes[0].verdict == "skipped"


def test_a_factory_of_trainers_takes_knobs_as_keywords() -> None:
    make = factory()

    class Trainers:
        knobs: ClassVar[Any] = {"gradient_checkpointing": (True,), "twice": (True,)}

        @staticmethod
        def make_trainer(*, twice: bool = False, **options: Any) -> Any:
            trainer = make(**options)
            trainer.label_smoother = None
            if twice:
                inner = trainer.compute_loss
                trainer.compute_loss = lambda *args, **named: 2 * inner(*args, **named)
            return trainer

    axis = check(Trainers, ["knobs"]).axes[0]
    assert axis.cause == "unscaled-sum"
    assert "twice=True" in axis.reason
