"""Loops after published reports: the verdict and the cause of each."""

import pytest
from reports2 import REPORTS, Report, judged


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.subject)
def test_a_published_report_is_judged_right(report: Report) -> None:
    good, causes, failed = judged(report)
    assert good, (causes, failed)
