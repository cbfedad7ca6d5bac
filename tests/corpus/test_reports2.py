"""Loops after published reports: the verdict and the cause of each."""

import pytest
from reports2 import REPORTS, Report, judged


@pytest.mark.sampled(4)
# A schedule that moves before its optimizer is what two of the loops are about.
@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.subject)
def test_a_published_report_is_judged_right(report: Report) -> None:
    good, causes, failed = judged(report)
    assert good, (causes, failed)
