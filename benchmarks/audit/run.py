"""Audits the real trainers of subjects.py, then the heads of sweep.py, and writes docs/audit.md.

    python benchmarks/audit/run.py

It resumes: what has a result of the installed releases in benchmarks/results is not repeated.
"""

import argparse
import json
import os
import time
from importlib.metadata import version
from typing import Any

import subjects
import sweep
import torch
from forks import in_forks
from tables import ROOT, SUBJECTS, write_docs

from samestep.audit.adapters.trainer import TrainerSubject
from samestep.audit.axes.table import AXES
from samestep.audit.check import check_subject
from samestep.audit.experiments import Experiments
from samestep.utils.files import write_atomically


def audit(name: str) -> dict[str, Any]:
    """The report on a subject, with the step at accumulation 4 against 1 beside it."""
    subject = TrainerSubject(getattr(subjects, name), name=name)
    start = time.perf_counter()
    report = check_subject(subject).as_dict()
    seconds = time.perf_counter() - start
    inexact = [axis["name"] for axis in report["axes"] if axis["verdict"] == "inexact"]
    factory, options = getattr(subjects, name), {"two_pass": True} if "router" in name else {}
    cured = sweep.with_exact(factory, name, inexact, **options) if inexact else None
    return {
        **report,
        "with exact": cured,
        "accumulation 4": sweep.at_four(Experiments.start(subject)),
        "seconds": seconds,
    }


def resume(jobs: int) -> None:
    """Audit the trainers that have no result on every axis with the installed releases."""
    packages = {name: version(name) for name in ("torch", "transformers", "trl", "samestep")}
    held = json.loads(SUBJECTS.read_text()) if SUBJECTS.exists() else {}
    known = held.get("subjects", {}) if held.get("versions") == packages else {}
    found = {name: known[name] for name in subjects.NAMES if _is_whole(known.get(name))}
    left = [name for name in subjects.NAMES if name not in found]
    for name, one in in_forks(audit, left, jobs=jobs, seconds=1200):
        found[name] = one
        print(f"{name}: {one['verdict']}", flush=True)
        ordered = {each: found[each] for each in subjects.NAMES if each in found}
        text = json.dumps({"versions": packages, "subjects": ordered}, indent=1)
        write_atomically(SUBJECTS, text.replace(str(ROOT), ".") + "\n")


def _is_whole(found: dict[str, Any] | None) -> bool:
    """Whether a result says what `exact` makes of it, and holds every axis that there is now."""
    if found is None or "with exact" not in found:
        return False
    axes = {axis["name"] for axis in found["axes"]}
    return axes >= {name for name, axis in AXES.items() if not axis.on_request}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="trainers, or heads, at a time")
    jobs = parser.parse_args().jobs
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    resume(jobs)
    sweep.resume(jobs=jobs)
    sweep.resume_cures(jobs=jobs)
    write_docs()


if __name__ == "__main__":
    main()
