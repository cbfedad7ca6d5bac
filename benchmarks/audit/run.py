"""Audits the real trainers of subjects.py, resumes the sweep of heads, and writes docs/audit.md.

    python benchmarks/audit/run.py

Results are kept in benchmarks/results: a class of the sweep that has one is not repeated.
"""

import json
import os
import time
from importlib.metadata import version
from typing import Any

import subjects
import sweep
import torch
from forks import in_fork
from tables import ROOT, SUBJECTS, write_docs

from samestep.audit.adapters.trainer import TrainerSubject
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
    cured = sweep.with_exact(getattr(subjects, name), name, inexact) if inexact else None
    return {
        **report,
        "with exact": cured,
        "accumulation 4": sweep.at_four(Experiments.start(subject)),
        "seconds": seconds,
    }


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    found = {}
    for name in subjects.NAMES:
        found[name] = in_fork(audit, name, seconds=600)
        print(f"{name}: {found[name]['verdict']}", flush=True)
    packages = {name: version(name) for name in ("torch", "transformers", "trl", "samestep")}
    text = json.dumps({"versions": packages, "subjects": found}, indent=1)
    write_atomically(SUBJECTS, text.replace(str(ROOT), ".") + "\n")
    sweep.resume()
    sweep.resume_cures()
    write_docs()


if __name__ == "__main__":
    main()
