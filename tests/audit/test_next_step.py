"""The axis of the next step: loops whose first step is exact, and what they keep for the second."""

import pytest
from kit import Case
from next_steps import CASES

from samestep.audit.check import check

SEED = 5


@pytest.mark.sampled(4)
# A schedule that moves before its optimizer is what one of them is about.
@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_leaks_into_the_next_step_is_named(case: Case) -> None:
    report = check(case.build(SEED), case.axes)
    found = {axis.name: axis.cause for axis in report.axes if axis.verdict == "inexact"}
    assert found.get(case.axis) == case.cause
    assert {*found.values()} == ({case.cause} if case.cause else set())
