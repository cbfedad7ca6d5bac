"""Copies of published reports as subjects (`published/`), and what the auditor has to say of each.

python tests/corpus/reports2.py [--only NAME]
"""

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from samestep.audit.check import check

FOLDER = Path(__file__).with_name("published")


@dataclass(frozen=True)
class Report:
    """A subject after a published report, and the right answer.

    Attributes:
        subject: ``FILE.py:NAME`` in `FOLDER`, or the file alone.
        right: From the axis to its cause; all other axes must be exact or skipped.
        also: Causes that are as true on the other axes.
        axes: The axes to run; None: the default ones.
    """

    subject: str
    right: dict[str, str] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    axes: tuple[str, ...] | None = None


TRAINERS = ("duplicated-examples", "eval-mean-of-means")

REPORTS = [
    Report("closure_sound.py"),
    Report("ema_weights.py:Bad", {"micro-batch": "state-per-micro-batch"}),
    Report("ema_weights.py:Fixed"),
    Report("rate_per_micro_batch.py:Silent", {"micro-batch": "state-per-micro-batch"}),
    Report("rate_per_micro_batch.py:Bad",
           {"micro-batch": "state-per-micro-batch", "reported": "state-per-micro-batch"}),
    Report("rate_per_micro_batch.py:Fixed"),
    Report("unfinished_window.py:Bad", {"short-window": "dropped-examples"}),
    Report("unfinished_window.py:Mean", {"short-window": "dropped-examples"},
           also=("mean-of-means",)),
    Report("unfinished_window.py:Fixed"),
    Report("decay_per_micro_batch.py:Bad", {"micro-batch": "state-per-micro-batch"}),
    Report("decay_per_micro_batch.py:LastDecays", {"micro-batch": "state-per-micro-batch"}),
    Report("decay_per_micro_batch.py:Fixed"),
    Report("advantages_of_others.py:Bad", {"micro-batch": "misaligned-values"}),
    Report("advantages_of_others.py:Fixed"),
    Report("task_means.py:Bad", {"micro-batch": "mean-of-means"}),
    Report("task_means.py:Fixed"),
    Report("fused_first_weight.py:Bad", {"reported": "reported-not-optimised"},
           also=("reported-not-optimised", "batch-coupled-term", "misaligned-values")),
    Report("fused_first_weight.py:Fixed"),
    Report("unreported_penalty.py:Features", {"reported": "reported-not-optimised"}),
    Report("unreported_penalty.py:Tokens", {"reported": "reported-not-optimised"}),
    Report("trimmed_teacher.py:Bad", {"micro-batch": "dropped-examples"}),
    Report("trimmed_teacher.py:Fixed"),
    Report("some_weights.py:First", {"micro-batch": "last-micro-batch-only"}),
    Report("some_weights.py:Frozen", {"micro-batch": "weights-left-out"}),
    Report("some_weights.py:Fixed"),
    Report("packed_positions.py:Rotary"),
    Report("packed_positions.py:Learned", {"packing": "position-leak"}),
    Report("packed_positions.py:Fixed"),
    Report("rotary_left_padding.py:NeoX"),
    Report("rotary_left_padding.py:Llama"),
    # What every transformers.Trainer does: ranks repeat rows, evaluations average batches.
    Report("trainer_with_own_loader.py:reads", also=TRAINERS),
    Report("trainer_with_own_loader.py:shuffles", also=TRAINERS),
    Report("trainer_with_own_loader.py:plain", also=TRAINERS),
    Report("trainer_with_own_loader.py:contrast", {"micro-batch": "batch-coupled-term"},
           also=TRAINERS),
]  # fmt: skip


def judged(report: Report) -> tuple[bool, dict[str, str], list[str]]:
    """Whether all is right, the cause of each inexact axis, and axes where the auditor failed."""
    found = check(str(FOLDER / report.subject), report.axes)
    causes = {axis.name: str(axis.cause) for axis in found.axes if axis.verdict == "inexact"}
    failed = [f"{axis.name}: {axis.reason}" for axis in found.axes if "audit itself" in axis.reason]
    allowed = {*report.right.values(), *report.also}
    named = all(causes.get(axis) == cause for axis, cause in report.right.items())
    return named and {*causes.values()} <= allowed and not failed, causes, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    wrong = 0
    for report in REPORTS:
        if given.only in report.subject:
            start = time.perf_counter()
            good, causes, failed = judged(report)
            wrong += not good
            took = time.perf_counter() - start
            said = causes or "exact"
            print(
                f"{'good' if good else 'BAD '} {report.subject} {said} {failed or ''} {took:.1f}s"
            )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
