"""What one release does: each subject by some axes, as it is and with `samestep.hf.exact`.

    python measure.py RESULT.json        in the release's own environment; resumes

Each is run in a fork of this process, which has the libraries loaded. No cause is named: that a
number is there, and how large it is, is what the history is about.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import subjects
import torch
from forks import in_fork

from page import EXACT, NAMES, PLAIN
from samestep.audit.adapters.trainer import TrainerSubject
from samestep.audit.axes.axis import Axis, run_axis
from samestep.audit.axes.table import AXES
from samestep.audit.experiments import Experiments
from samestep.audit.gradients import compare_gradients
from samestep.utils.files import write_atomically

COLUMNS = ("micro-batch", "short-window", "evaluation-batch", "ranks")
ON_RANKS = ("causal_lm", "masked_lm")
"""Two processes are slow to start: of the others the micro-batch tells the same."""

PACKAGES = ("torch", "transformers", "trl", "accelerate")


def undiagnosed(axis: Axis) -> Axis:
    """An axis that stops once it has measured."""
    return replace(axis, measure=lambda found: replace(axis.measure(found), diagnose=None))


def audit(name: str) -> dict[str, Any]:
    """The verdicts on a subject, and the step at 1 x 8 against 8 x 1."""
    way, _, kind = name.partition(": ")
    factory = getattr(subjects, kind)
    subject = TrainerSubject(made_exact(factory) if way == EXACT else factory, name=kind)
    experiments = Experiments.start(subject)
    single = tuple((index,) for index in range(subject.size))
    step = compare_gradients(
        experiments.run(single).gradient, experiments.run(experiments.whole_batch).gradient
    )
    columns = [column for column in COLUMNS if column != "ranks" or kind in ON_RANKS]
    axes = [run_axis(undiagnosed(AXES[column]), experiments) for column in columns]
    return {
        "verdict": next(axis.verdict for axis in axes if axis.name == "micro-batch"),
        "examples": subject.size,
        "ratio": step.ratio,
        "cosine": step.cosine,
        "difference": step.relative_difference,
        "axes": {
            axis.name: {
                "verdict": axis.verdict,
                "difference": axis.relative_difference,
                "reason": axis.reason,
            }
            for axis in axes
        },
    }


def made_exact(factory: Callable[..., Any]) -> Callable[..., Any]:
    """A factory whose trainers are exact, or are refused."""
    from samestep.hf import exact

    return lambda **sizes: exact(factory(**sizes))


def resume(path: Path) -> None:
    """Measure what has no result yet."""
    done = json.loads(path.read_text()) if path.exists() else {"subjects": {}}
    done["versions"] = {name: version(name) for name in PACKAGES}
    for way, kind in itertools.product((PLAIN, EXACT), NAMES):
        ways = done["subjects"].setdefault(kind, {})
        if way in ways:
            continue
        start = time.perf_counter()
        ways[way] = in_fork(audit, f"{way}: {kind}", seconds=900)
        seconds = time.perf_counter() - start
        print(f"{way}: {kind}: {summary(ways[way])} ({seconds:.0f} s)", flush=True)
        write_atomically(path, json.dumps(done, indent=1) + "\n")


def summary(found: dict[str, Any]) -> str:
    """A result on a line."""
    if found["verdict"] == "not run":
        return f"not run: {found['why']}"
    verdicts = [f"{name} {axis['verdict']}" for name, axis in found["axes"].items()]
    return f"x {found['ratio']:.3f}, {', '.join(verdicts)}"


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    resume(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
