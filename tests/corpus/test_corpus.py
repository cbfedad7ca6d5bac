"""The corpus, a part of it by default and all of it with ``-m slow``; and that it can fail."""

import dataclasses

import pytest
from corpus_run import FAMILIES, FINAL_SEEDS, audit, meets_the_bar, run, totals
from kit import Case

from samestep.audit import experiments
from samestep.audit.check import CheckReport

SEED = 3


def some(case: Case) -> bool:
    """One subject in five of each family, the first of them sound."""
    return any(case in cases[::5] for cases in FAMILIES.values())


def test_a_part_meets_the_bar() -> None:
    outcomes = run([SEED], choose=some)
    assert meets_the_bar(totals(outcomes)), [one for one in outcomes if not one.good]


@pytest.mark.slow
def test_the_corpus_meets_the_bar() -> None:
    outcomes = run(FINAL_SEEDS)
    counts = totals(outcomes)
    assert meets_the_bar(counts), [one for one in outcomes if not one.good]
    assert counts["bugs"] >= 40
    assert counts["sound"] >= 20


def few(case: Case) -> bool:
    return case in FAMILIES["token loops"][::6]


def test_an_auditor_that_sees_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "TOLERANCE_FACTOR", float("inf"))
    counts = totals(run([SEED], choose=few))
    assert not meets_the_bar(counts)
    assert counts["detected"] == 0


def test_an_auditor_that_sees_too_much_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "TOLERANCE_FACTOR", 1e-6)
    counts = totals(run([SEED], choose=few))
    assert not meets_the_bar(counts)
    assert counts["false_alarms"] == counts["audits_of_sound"] > 0


def test_an_auditor_that_mixes_causes_up_fails() -> None:
    counts = totals(run([SEED], mixed_up, choose=few))
    assert not meets_the_bar(counts)
    assert counts["detected"] == counts["audits_of_bugs"] > 0
    assert counts["right_cause"] == 0


def mixed_up(case: Case, seed: int) -> CheckReport:
    """The auditor with every cause replaced by another."""

    def other(cause: str | None) -> str:
        return "unscaled-sum" if cause == "mean-of-means" else "mean-of-means"

    report = audit(case, seed)
    axes = [
        dataclasses.replace(axis, cause=other(axis.cause)) if axis.verdict == "inexact" else axis
        for axis in report.axes
    ]
    return dataclasses.replace(report, axes=tuple(axes))
