"""The examples run, and show what they claim."""

import runpy
from pathlib import Path

import pytest

import samestep

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_own_loop_learns_the_same_under_every_split() -> None:
    module = runpy.run_path(str(EXAMPLES / "own_loop.py"))
    whole, split = module["train"](32, steps=5), module["train"](1, steps=5)
    assert whole[-1] < whole[0]
    assert split == pytest.approx(whole, rel=1e-5)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("subject", "inexact"),
    [
        ("check_samestep.py", {}),
        ("check_accelerate.py:Sound", {}),
        (
            "check_accelerate.py:MeanOfMeans",
            {"micro-batch": "mean-of-means", "zero-target": "mean-of-means"},
        ),
        ("check_lightning.py:Sound", {}),
        (
            "check_lightning.py:MeanOfMeans",
            {"micro-batch": "mean-of-means", "zero-target": "mean-of-means"},
        ),
    ],
)
def test_the_subjects_of_check_get_the_verdict_that_they_claim(
    subject: str, inexact: dict[str, str]
) -> None:
    report = samestep.check(str(EXAMPLES / subject))
    found = {axis.name: axis.cause for axis in report.axes if axis.verdict == "inexact"}
    assert found == inexact


def test_a_trainer_of_classes_is_multiplied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a trainer makes its output folder
    report = samestep.check(str(EXAMPLES / "check_trainer.py"), axes=["micro-batch"])
    assert report.axes[0].cause == "unscaled-sum"
    assert report.axes[0].ratio == pytest.approx(8)


def test_dropout_of_samestep_does_not_follow_the_split() -> None:
    report = samestep.check(str(EXAMPLES / "check_samestep.py"), axes=["dropout"])
    assert report.verdict == "exact", report.axes
