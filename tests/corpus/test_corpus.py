"""A part of the corpus; and that it can fail. All of it: ``make corpus``."""

import dataclasses

import pytest
from corpus_run import FAMILIES, audit, meets_the_bar, run, totals
from kit import Case
from thorough import THOROUGH

from samestep.audit import experiments
from samestep.audit.check import CheckReport

SEED = 3
PARTS = 4 if THOROUGH else 20
"""One subject in so many is audited; which, moves on from family to family, so that no place in a
family is never audited."""


def some(case: Case) -> bool:
    """A part of each family, from another one on in each."""
    families = enumerate(FAMILIES.values())
    return any(case in cases[number % PARTS :: PARTS] for number, cases in families)


@pytest.mark.slow
def test_a_part_meets_the_bar() -> None:
    outcomes = run([SEED], choose=some)
    assert meets_the_bar(totals(outcomes)), [one for one in outcomes if not one.good]


def test_laws_that_fit_one_cut_by_accident_are_held_against_others() -> None:
    """At this seed micro-batches hold groups in equal shares, and weights are whole numbers."""
    names = (
        "groups of points, a macro average",
        "sources, a mean each",
        "languages, a mean each",
        "odd micro-batches repeat a point",
    )
    outcomes = run([303], choose=lambda case: case.name in names)
    assert len(outcomes) == len(names)
    assert meets_the_bar(totals(outcomes)), [one for one in outcomes if not one.good]


def test_the_corpus_is_as_large_as_it_says() -> None:
    cases = [case for family in FAMILIES.values() for case in family]
    bugs = [case for case in cases if case.cause]
    assert len(bugs) >= 160
    assert len(cases) - len(bugs) >= 90
    names = [(family, case.name) for family, own in FAMILIES.items() for case in own]
    assert len(names) == len(set(names))


def few(case: Case) -> bool:
    return case in FAMILIES["token loops"][::6]


def test_an_auditor_that_sees_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "TOLERANCE_FACTOR", float("inf"))
    counts = totals(run([SEED], choose=few))
    assert not meets_the_bar(counts)
    assert counts["detected"] == 0


def test_an_auditor_that_sees_too_much_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "TOLERANCE_FACTOR", 1e-6)
    counts = totals(run([SEED], choose=lambda case: few(case) and not case.cause))
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
