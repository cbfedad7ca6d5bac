"""Audit every subject of the corpus and print what was detected, named, and raised in vain.

python tests/corpus/corpus_run.py [--seeds 200 201 202] [--only NAME] [--json FILE]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import ddp_scripts
import knobs_and_loaders
import models_and_batches
import next_steps
import other_losses
import precision
import reports
import token_loops
import trainer_subclasses
import updates
from kit import Case
from rich.console import Console
from rich.table import Table

from samestep.audit.check import CheckReport, check

FAMILIES = {
    "token loops": token_loops.CASES,
    "other losses": other_losses.CASES,
    "models and batches": models_and_batches.CASES,
    "reports": reports.CASES,
    "updates": updates.CASES,
    "next steps": next_steps.CASES,
    "knobs and loaders": knobs_and_loaders.CASES,
    "precision": precision.CASES,
    "DDP scripts": ddp_scripts.CASES,
    "trainer subclasses": trainer_subclasses.CASES,
}
FINAL_SEEDS = (200, 201, 202)
"""Not used while developing, and of other numbers of examples and lengths than seeds below 100."""

Auditor = Callable[[Case, int], CheckReport]


@dataclass(frozen=True)
class Outcome:
    """What the auditor made of one subject at one seed."""

    family: str
    case: Case
    seed: int
    found: dict[str, str]
    """The cause of each inexact axis."""
    seconds: float

    @property
    def detected(self) -> bool:
        return bool(self.found)

    @property
    def named(self) -> bool:
        """The right cause on the right axis, and no wrong one on another."""
        allowed = {self.case.cause, *self.case.also}
        return (
            self.found.get(self.case.axis) == self.case.cause and {*self.found.values()} <= allowed
        )

    @property
    def good(self) -> bool:
        return self.named if self.case.cause else not self.detected


def audit(case: Case, seed: int) -> CheckReport:
    return check(case.build(seed), case.axes)


def run(
    seeds: Iterable[int],
    auditor: Auditor = audit,
    *,
    choose: Callable[[Case], bool] = lambda case: True,
    say: Callable[[str], None] = lambda text: None,
) -> list[Outcome]:
    """Audit the subjects that are chosen.

    Raises:
        AssertionError: An axis of a subject was skipped because the subject failed.
    """
    outcomes = []
    for family, cases in FAMILIES.items():
        for case in cases:
            if not choose(case):
                continue
            for seed in seeds:
                start = time.perf_counter()
                report = auditor(case, seed)
                failed = [
                    axis.reason for axis in report.axes if "the subject failed" in axis.reason
                ]
                assert not failed, (case.name, seed, failed)
                found = {
                    axis.name: str(axis.cause) for axis in report.axes if axis.verdict == "inexact"
                }
                seconds = time.perf_counter() - start
                outcomes.append(Outcome(family, case, seed, found, seconds))
                say(f"{'good' if outcomes[-1].good else 'BAD '} {family}: {case.name} ({seed})")
    return outcomes


def totals(outcomes: list[Outcome]) -> dict[str, int]:
    """Counts over subjects and seeds."""
    bugs = [one for one in outcomes if one.case.cause]
    sound = [one for one in outcomes if not one.case.cause]
    return {
        "bugs": len({(one.family, one.case.name) for one in bugs}),
        "sound": len({(one.family, one.case.name) for one in sound}),
        "audits_of_bugs": len(bugs),
        "detected": sum(one.detected for one in bugs),
        "right_cause": sum(one.named for one in bugs),
        "audits_of_sound": len(sound),
        "false_alarms": sum(one.detected for one in sound),
    }


def meets_the_bar(counts: dict[str, int]) -> bool:
    """Every bug detected and named, no false alarm."""
    return (
        counts["detected"] == counts["right_cause"] == counts["audits_of_bugs"]
        and counts["false_alarms"] == 0
    )


def show(outcomes: list[Outcome], console: Console) -> None:
    table = Table("family", "subjects", "bugs detected", "right cause", "sound", "false alarms")
    for family in sorted({outcome.family for outcome in outcomes}, key=list(FAMILIES).index):
        one = totals([outcome for outcome in outcomes if outcome.family == family])
        table.add_row(
            family,
            str(one["bugs"] + one["sound"]),
            f"{one['detected']}/{one['audits_of_bugs']}",
            f"{one['right_cause']}/{one['audits_of_bugs']}",
            str(one["audits_of_sound"]),
            str(one["false_alarms"]),
        )
    console.print(table)
    for one in outcomes:
        if not one.good:
            console.print(f"{one.case.name} (seed {one.seed}): {one.found}, not {one.case.cause}")
    console.print(totals(outcomes))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(FINAL_SEEDS))
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    console = Console(highlight=False, width=120)
    outcomes = run(given.seeds, choose=lambda case: given.only in case.name, say=console.print)
    show(outcomes, console)
    counts = totals(outcomes)
    if given.json:
        record = {
            "seeds": given.seeds,
            **counts,
            "seconds": round(sum(o.seconds for o in outcomes)),
        }
        given.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0 if meets_the_bar(counts) else 1


if __name__ == "__main__":
    sys.exit(main())
