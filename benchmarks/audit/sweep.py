"""The league table: every trainable head of `transformers`, small, under the auditor.

    python benchmarks/audit/sweep.py            resumes: classes that have a result are not repeated

Each class is audited in a fork of a process that has the libraries loaded, with a limit of time and
of memory. Only the axis of the micro-batch is run.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from forks import in_forks, short
from heads import TASKS, classes_of, head
from tables import HEADS

from samestep.audit.adapters.trainer import TrainerSubject
from samestep.audit.adapters.trainer_setup import suppress_output
from samestep.audit.axes.axis import Axis, Measurement, run_axis
from samestep.audit.axes.table import AXES
from samestep.audit.experiments import Experiments
from samestep.audit.gradients import compare_gradients
from samestep.errors import SamestepError
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


def with_exact(
    factory: Callable[..., Any], name: str, axes: Sequence[str], **options: Any
) -> dict[str, Any]:
    """The verdict on the same trainer after `samestep.hf.exact`, on the axes that were inexact.

    Args:
        factory: ``make_trainer``.
        name: Of it.
        axes: Names.
        options: Of `exact`.

    Returns:
        ``verdict``: "exact", "refused" with why, or "inexact" with the axes that are left, and
        then with what ``prove=True`` says of it, if it says something; the axes that are now
        ``refused``, such as ranks that would repeat pairs.
    """
    try:
        subject = TrainerSubject(lambda **sizes: exact(factory(**sizes), **options), name=name)
        experiments = Experiments.start(subject)
    except Exception as error:
        return {"verdict": "refused", "why": short(error)}
    verdicts = {axis: run_axis(_judged_only(axis), experiments).verdict for axis in axes}
    left = [axis for axis, verdict in verdicts.items() if verdict == "inexact"]
    found = {"verdict": "inexact" if left else "exact", "left": left, "options": options}
    refused = [axis for axis, verdict in verdicts.items() if verdict == "skipped"]
    found |= {"refused": refused} if refused else {}
    return {**found, "prove": _proof(factory, **options)} if left else found


def _judged_only(name: str) -> Axis:
    """An axis that names no cause: a diagnosis takes longer than the verdict."""

    def measure(experiments: Experiments) -> Measurement:
        return replace(AXES[name].measure(experiments), diagnose=None)

    return replace(AXES[name], measure=measure)


def _proof(factory: Callable[..., Any], **options: Any) -> str | None:
    """Why ``exact(trainer, prove=True)`` stops before the first step, if it does."""
    trainer = factory(per_device_train_batch_size=8, gradient_accumulation_steps=1)
    trainer.args.max_steps = 1
    try:
        with suppress_output():
            exact(trainer, prove=True, **options).train()
    except SamestepError as error:
        return short(error)
    return None


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


def resume(tasks: Sequence[str] = tuple(TASKS), *, retry: bool = False, jobs: int = 1) -> None:
    """Audit the classes that have no result; with ``retry`` those that could not be run, too."""
    done = json.loads(HEADS.read_text()) if HEADS.exists() else {"classes": {}}
    done["versions"] = {name: version(name) for name in ("torch", "transformers", "samestep")}
    known = done["classes"]
    task_of = {
        name: task
        for task in tasks
        for name in classes_of(task)
        if name not in known or (retry and known[name]["verdict"] == "not run")
    }
    for name, found in in_forks(audit, task_of, jobs=jobs):
        known[name] = {"task": task_of[name], **found}
        print(f"{name}: {found}", flush=True)
        write_atomically(HEADS, json.dumps(done, indent=1) + "\n")


def resume_cures(names: Sequence[str] = (), *, jobs: int = 1) -> None:
    """Apply `samestep.hf.exact` to each inexact class, or to these, that was not tried yet."""
    done = json.loads(HEADS.read_text())
    inexact = [name for name, found in done["classes"].items() if found["verdict"] == "inexact"]
    if names:
        chosen = [name for name in inexact if name in names]
    else:
        chosen = [name for name in inexact if "with exact" not in done["classes"][name]]
    for name, found in in_forks(cure, chosen, jobs=jobs, seconds=300):
        done["classes"][name]["with exact"] = found
        print(f"{name} with exact: {found}", flush=True)
        write_atomically(HEADS, json.dumps(done, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=[*TASKS], action="append", help="by default all")
    parser.add_argument("--retry", action="store_true", help="repeat the classes that were not run")
    parser.add_argument(
        "--cure", metavar="CLASS", action="append", help="only apply exact to these classes"
    )
    parser.add_argument("--jobs", type=int, default=2, help="classes at a time")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    if given.cure:
        resume_cures(given.cure, jobs=given.jobs)
        return
    resume(given.task or tuple(TASKS), retry=given.retry, jobs=given.jobs)
    resume_cures(jobs=given.jobs)


if __name__ == "__main__":
    main()
