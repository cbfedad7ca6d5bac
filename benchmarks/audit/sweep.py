"""The league table: every trainable head of `transformers`, small, under the auditor.

    python benchmarks/audit/sweep.py            resumes: classes that have a result are not repeated

Each class is audited in a fork of a process that has the libraries loaded, with a limit of time and
of memory. Only the axis of the micro-batch is run.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from forks import in_fork, short
from heads import TASKS, classes_of, head
from tables import HEADS

from samestep.audit.adapters.trainer import TrainerSubject
from samestep.audit.axes.axis import run_axis
from samestep.audit.axes.table import AXES
from samestep.audit.experiments import Experiments
from samestep.audit.gradients import compare_gradients
from samestep.utils.files import write_atomically


def audit(name: str) -> dict[str, Any]:
    """The verdict on a class: of text alone, or with a picture a row where it insists on one."""
    errors = []
    for image in (False, True):
        try:
            subject = TrainerSubject(head(name, image=image), name=name)
            experiments = Experiments.start(subject)
            axis = run_axis(AXES["micro-batch"], experiments)
        except Exception as error:  # a class that cannot be built, or run, is listed with why
            errors.append(short(error))
            continue
        return {
            "verdict": axis.verdict,
            **at_four(experiments),
            "worst": axis.relative_difference,
            "cause": axis.cause,
            "inputs": "text and picture" if image else "text",
        }
    return {"verdict": "not run", "why": errors[0]}


def at_four(experiments: Experiments) -> dict[str, Any]:
    """Accumulation 4 against 1, which is how these bugs are usually reported."""
    indices = range(experiments.subject.size)
    split = tuple(tuple(indices[start : start + 2]) for start in range(0, len(indices), 2))
    whole = experiments.run(experiments.whole_batch).gradient
    found = compare_gradients(experiments.run(split).gradient, whole)
    return {"ratio": found.ratio, "cosine": found.cosine, "difference": found.relative_difference}


def resume(tasks: Sequence[str] = tuple(TASKS), *, retry: bool = False) -> None:
    """Audit the classes that have no result; with ``retry`` those that could not be run, too."""
    done = json.loads(HEADS.read_text()) if HEADS.exists() else {"classes": {}}
    done["versions"] = {name: version(name) for name in ("torch", "transformers", "samestep")}
    for task in tasks:
        for name in classes_of(task):
            known = done["classes"].get(name)
            if known is not None and not (retry and known["verdict"] == "not run"):
                continue
            start = time.perf_counter()
            found = in_fork(audit, name)
            done["classes"][name] = {"task": task, **found}
            print(f"{name}: {found} {time.perf_counter() - start:.1f} s", flush=True)
            write_atomically(HEADS, json.dumps(done, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=[*TASKS], action="append", help="by default all")
    parser.add_argument("--retry", action="store_true", help="repeat the classes that were not run")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    resume(given.task or tuple(TASKS), retry=given.retry)


if __name__ == "__main__":
    main()
