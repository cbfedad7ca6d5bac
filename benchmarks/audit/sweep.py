"""The league table: every trainable head of `transformers`, small, under the auditor.

    python benchmarks/audit/sweep.py            resumes: classes that have a result are not repeated

Each class is audited in a fork of a process that has the libraries loaded, with a limit of time and
of memory. Only the axis of the micro-batch is run.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
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
from samestep.hf import exact
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


def with_exact(factory: Callable[..., Any], name: str, axes: Sequence[str]) -> dict[str, Any]:
    """The verdict on the same trainer after `samestep.hf.exact`, on the axes that were inexact.

    Returns:
        ``verdict``: "exact", "inexact" with the axes that are left, or "refused" with why.
    """
    try:
        subject = TrainerSubject(lambda **sizes: exact(factory(**sizes)), name=name)
        experiments = Experiments.start(subject)
    except Exception as error:
        return {"verdict": "refused", "why": short(error)}
    left = [axis for axis in axes if run_axis(AXES[axis], experiments).verdict == "inexact"]
    return {"verdict": "inexact" if left else "exact", "left": left}


def cure(name: str) -> dict[str, Any]:
    """`with_exact` of a class, of text alone or with a picture a row as it was audited."""
    done = json.loads(HEADS.read_text())["classes"][name]
    factory = head(name, image=done["inputs"] != "text")
    return with_exact(factory, name, ["micro-batch"])


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


def resume_cures(names: Sequence[str] = ()) -> None:
    """Apply `samestep.hf.exact` to each inexact class, or to these, that was not tried yet."""
    done = json.loads(HEADS.read_text())
    for name, found in done["classes"].items():
        chosen = name in names if names else "with exact" not in found
        if found["verdict"] == "inexact" and chosen:
            found["with exact"] = in_fork(cure, name)
            print(f"{name} with exact: {found['with exact']}", flush=True)
            write_atomically(HEADS, json.dumps(done, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=[*TASKS], action="append", help="by default all")
    parser.add_argument("--retry", action="store_true", help="repeat the classes that were not run")
    parser.add_argument(
        "--cure", metavar="CLASS", action="append", help="only apply exact to these classes"
    )
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    if given.cure:
        resume_cures(given.cure)
        return
    resume(given.task or tuple(TASKS), retry=given.retry)
    resume_cures()


if __name__ == "__main__":
    main()
