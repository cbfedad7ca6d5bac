"""Audit every subject of the corpus and print what was detected, named, and raised in vain.

python tests/corpus/corpus_run.py [--seeds 801 802 803] [--family NAME] [--only NAME] [--jobs 3]
    [--json FILE]
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import ddp_scripts
import inside_the_loop
import knobs_and_loaders
import models_and_batches
import next_steps
import other_losses
import parts_and_norms
import places
import precision
import reports
import state_between
import token_loops
import torch
import trainer_subclasses
import updates
import what_is_said
import windows_and_values
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
    "state between": state_between.CASES,
    "windows and values": windows_and_values.CASES,
    "parts and norms": parts_and_norms.CASES,
    "what is said": what_is_said.CASES,
    "places": places.CASES,
    "inside the loop": inside_the_loop.CASES,
}
FINAL_SEEDS = (801, 802, 803)
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
    failed: tuple[str, ...] = ()
    """Why axes were skipped where the subject or the audit itself failed."""

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


def outcome(family: str, case: Case, seed: int, auditor: Auditor = audit) -> Outcome:
    """Audit one subject at one seed."""
    start = time.perf_counter()
    report = auditor(case, seed)
    found = {axis.name: str(axis.cause) for axis in report.axes if axis.verdict == "inexact"}
    reasons = (axis.reason for axis in report.axes if axis.verdict == "skipped")
    failed = tuple(why for why in reasons if "the subject failed" in why or "audit itself" in why)
    return Outcome(family, case, seed, found, time.perf_counter() - start, failed)


def run(
    seeds: Iterable[int],
    auditor: Auditor = audit,
    *,
    choose: Callable[[Case], bool] = lambda case: True,
) -> list[Outcome]:
    """Audit the subjects that are chosen, at every seed.

    Raises:
        AssertionError: An axis of a subject was skipped because the subject failed.
    """
    outcomes = [
        outcome(family, case, seed, auditor)
        for family, cases in FAMILIES.items()
        for case in filter(choose, cases)
        for seed in seeds
    ]
    failed = [(one.case.name, one.seed, one.failed) for one in outcomes if one.failed]
    assert not failed, failed
    return outcomes


def _job(place: tuple[str, int, int]) -> tuple[dict[str, str], float, tuple[str, ...]]:
    """What a process does: subjects are named by family and number, as they cannot be sent."""
    family, number, seed = place
    one = outcome(family, FAMILIES[family][number], seed)
    return one.found, one.seconds, one.failed


def run_in_processes(
    seeds: Iterable[int], *, jobs: int, choose: Callable[[str, Case], bool]
) -> Iterator[Outcome]:
    """Audit the subjects that are chosen, several at a time, each in one thread."""
    places = [
        (family, number, seed)
        for family, cases in FAMILIES.items()
        for number, case in enumerate(cases)
        if choose(family, case)
        for seed in seeds
    ]
    torch.set_num_threads(1)
    # Forked, so that the libraries are imported once; nothing has run in a thread so far.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        for (family, number, seed), made in zip(places, pool.map(_job, places), strict=True):
            yield Outcome(family, FAMILIES[family][number], seed, *made)


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
    for family, one in by_family(outcomes).items():
        table.add_row(
            family,
            str(one["bugs"] + one["sound"]),
            f"{one['detected']}/{one['audits_of_bugs']}",
            f"{one['right_cause']}/{one['audits_of_bugs']}",
            str(one["audits_of_sound"]),
            str(one["false_alarms"]),
        )
    console.print(table)
    for each in outcomes:
        subject = f"{each.case.name} (seed {each.seed})"
        if not each.good:
            console.print(f"{subject}: {each.found}, not {each.case.cause}")
        if each.failed:
            console.print(f"{subject}: {each.failed}")
    console.print(totals(outcomes))


def by_family(outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    """The totals of each family that was audited."""
    held = {outcome.family for outcome in outcomes}
    return {
        family: totals([outcome for outcome in outcomes if outcome.family == family])
        for family in FAMILIES
        if family in held
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(FINAL_SEEDS))
    parser.add_argument("--family", default="")
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    console = Console(highlight=False, width=120)
    start, outcomes = time.perf_counter(), []
    for one in run_in_processes(
        given.seeds,
        jobs=given.jobs,
        choose=lambda family, case: given.family in family and given.only in case.name,
    ):
        outcomes.append(one)
        console.print(
            f"{'good' if one.good else 'BAD '} {one.family}: {one.case.name} ({one.seed}) "
            f"{'' if one.good else one.found} {one.seconds:.1f} s"
        )
    show(outcomes, console)
    counts = totals(outcomes)
    failed = any(one.failed for one in outcomes)
    if given.json:
        record = {
            "seeds": given.seeds,
            **counts,
            "families": by_family(outcomes),
            "seconds": round(time.perf_counter() - start),
        }
        given.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0 if meets_the_bar(counts) and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
