"""The league table: every trainable head of `transformers`, small, under the auditor.

    python benchmarks/audit/sweep.py            resumes: classes that have a result are not repeated

Each class is audited in a fork of a process that has the libraries loaded, with a limit of time and
of memory. Only the axis of the micro-batch is run.
"""

import argparse
import json
import multiprocessing
import os
import re
import resource
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from heads import TASKS, classes_of, head

from samestep.audit.adapters.trainer import TrainerSubject
from samestep.audit.axes import micro_batch
from samestep.audit.runs import Runs
from samestep.audit.vectors import compare
from samestep.files import write_atomically

RESULTS = Path(__file__).parents[1] / "results" / "audit-heads.json"
SECONDS, BYTES = 120, 8 << 30


def audit(name: str) -> dict[str, Any]:
    """The verdict on a class: of text alone, or with a picture a row where it insists on one."""
    errors = []
    for image in (False, True):
        try:
            subject = TrainerSubject(head(name, image=image), name=name)
            runs = Runs.start(subject)
            axis = micro_batch(runs)
        except Exception as error:  # a class that cannot be built, or run, is listed with why
            errors.append(_short(error))
            continue
        return {
            "verdict": axis.verdict,
            **_at_four(runs),
            "worst": axis.relative_difference,
            "cause": axis.cause,
            "inputs": "text and picture" if image else "text",
        }
    return {"verdict": "not run", "why": errors[0]}


def _at_four(runs: Runs) -> dict[str, Any]:
    """Accumulation 4 against 1, which is how these bugs are usually told."""
    indices = range(runs.subject.size)
    cut = tuple(tuple(indices[start : start + 2]) for start in range(0, len(indices), 2))
    seen = compare(runs.run(cut).gradient, runs.run(runs.whole).gradient)
    return {"ratio": seen.ratio, "cosine": seen.cosine, "difference": seen.relative_difference}


def _short(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error)).replace("make_trainer failed: ", "")
    text = re.sub(r"\(/[^ ]*/([\w.]+:\d+)\)", r"(\1)", text)
    return text[:240]


def _work(name: str, sender: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    try:
        sender.send(audit(name))
    except BaseException as error:
        sender.send({"verdict": "not run", "why": f"{type(error).__name__}: {_short(error)}"})


def in_fork(name: str) -> dict[str, Any]:
    """The result of a class, from a process that is always ended."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(SECONDS):
            return {"verdict": "not run", "why": f"stopped after {SECONDS} s"}
        found: dict[str, Any] = receiver.recv()
        return found
    except EOFError:
        process.join()
        return {"verdict": "not run", "why": f"the process died with code {process.exitcode}"}
    finally:
        process.kill()
        process.join()
        receiver.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=[*TASKS, "all"], default="all")
    parser.add_argument("--retry", action="store_true", help="repeat the classes that were not run")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    done = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"classes": {}}
    done["versions"] = {name: version(name) for name in ("torch", "transformers", "samestep")}
    for task in TASKS if given.task == "all" else [given.task]:
        for name in classes_of(task):
            known = done["classes"].get(name)
            if known is not None and not (given.retry and known["verdict"] == "not run"):
                continue
            start = time.perf_counter()
            done["classes"][name] = {"task": task, **in_fork(name)}
            print(
                f"{name}: {done['classes'][name]} {time.perf_counter() - start:.1f} s", flush=True
            )
            write_atomically(RESULTS, json.dumps(done, indent=1) + "\n")


if __name__ == "__main__":
    main()
