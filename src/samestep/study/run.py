"""A study from its spec to its results: prepare the rows, run what is not cached, gather."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from samestep.models.load import resolve
from samestep.study.arm import Job
from samestep.study.cache import read_run
from samestep.study.labels import group_title, label
from samestep.study.processes import run_jobs, threads_a_run
from samestep.study.results import ArmResult, Results, Run
from samestep.study.spec import Arm, StudySpec
from samestep.study.tasks import Task, plan_tasks, prepare_rows, reference_arms

Say = Callable[[str], None]


def run_study(spec: StudySpec, out: Path, *, jobs: int, say: Say) -> Results:
    """Run a study; what an earlier call finished is not run again.

    Args:
        spec: The study.
        out: Its folder: ``rows/`` and ``runs/`` are kept there.
        jobs: Runs at a time.
        say: Takes a line of progress.

    Returns:
        The results.

    Raises:
        ConfigError: The model cannot be used.
        DataError: The rows cannot be used.
        StepError: A run failed; finished ones are kept.
    """
    (out / "rows").mkdir(parents=True, exist_ok=True)
    (out / "runs").mkdir(exist_ok=True)
    source = resolve(spec.model)
    lengths = prepare_rows(spec, source, out / "rows")
    grid = spec.grid()
    tasks = plan_tasks(spec, source, out)
    notes = _run_missing(tasks, grid, jobs=jobs, say=say)
    runs = _with_distances({(task.arm, task.seed): (task, _kept(task)) for task in tasks}, grid)
    references = reference_arms(grid)
    return Results(
        name=spec.name,
        spec=_without_places(spec.model_dump(mode="json")),
        machine={
            "cores": os.cpu_count() or 1,
            "jobs": jobs,
            "threads a run": threads_a_run(jobs),
            "system": platform.system(),
            "processor": platform.machine(),
            "Python": platform.python_version(),
        },
        versions={name: version(name) for name in ("samestep", "torch", "transformers")},
        lengths=lengths,
        arms=[
            ArmResult(
                label=label(arm, grid),
                group=group_title(arm, grid, cut_targets=spec.cut_targets),
                reference=references.get(arm.group()) is arm,
                batch=arm.batch,
                split=arm.split,
                normalisation=arm.normalisation,
                lr=arm.lr,
                cut=arm.cut,
                runs=[runs[arm, seed] for seed in arm.seeds],
            )
            for arm in grid
        ],
        notes=notes,
    )


def _without_places(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec with absolute paths cut to their names: results are passed on."""
    return {
        name: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for name, value in spec.items()
    }


def _run_missing(tasks: Sequence[Task], grid: Sequence[Arm], *, jobs: int, say: Say) -> list[str]:
    """Run what the cache lacks; returns notes on what was found damaged."""
    notes: list[str] = []
    missing: dict[str, Task] = {}
    for task in tasks:
        found, damage = _look(task)
        if damage is not None:
            note = (
                f"the cache entry of {_name(task, grid)} was damaged: it was run again ({damage})"
            )
            say(note)
            notes.append(note)
            task.file.unlink()
        if found is None:
            missing[task.job.key] = task
    finished = len(tasks) - len(missing)
    if finished:
        say(f"{finished} of {len(tasks)} runs are cached")

    def done(job: Job) -> None:
        nonlocal finished
        finished += 1
        run = _kept(missing[job.key])
        ended = f"evaluation loss {run.evaluations.loss[-1]:.4f}"
        ended = ended if run.diverged is None else f"diverged {run.diverged}"
        say(f"[{finished}/{len(tasks)}] {_name(missing[job.key], grid)}: {ended}")

    run_jobs([(task.job, task.file) for task in missing.values()], parallel=jobs, done=done)
    return notes


def _look(task: Task) -> tuple[Run | None, str | None]:
    """A task's kept run, and what is wrong with its file."""
    try:
        return read_run(task.file, task.job.key), None
    except ValueError as error:
        return None, str(error)


def _name(task: Task, grid: Sequence[Arm]) -> str:
    cut = f", {task.arm.cut:.0%} cut" if task.arm.cut else ""
    return f"{label(task.arm, grid)}{cut}, seed {task.seed}"


def _kept(task: Task) -> Run:
    run = read_run(task.file, task.job.key)
    assert run is not None
    return run


def _with_distances(
    runs: Mapping[tuple[Arm, int], tuple[Task, Run]], grid: Sequence[Arm]
) -> dict[tuple[Arm, int], Run]:
    """The runs, each with how far its weights ended from those of the reference."""
    references = reference_arms(grid)
    measured = {}
    for (arm, seed), (task, run) in runs.items():
        base = runs.get((references[arm.group()], seed)) if arm.group() in references else None
        apart = base and _weights_apart(task.job.weights, base[0].job.weights)
        if base is not None and apart is not None and base[1].travelled:
            run = run.model_copy(update={"distance": apart / base[1].travelled})
        measured[arm, seed] = run
    return measured


def _weights_apart(one: Path, other: Path) -> float | None:
    """The 2-norm between two files of weights; None if one is missing or cannot be read."""
    try:
        with safe_open(one, framework="pt") as first, safe_open(other, framework="pt") as second:
            squares = 0.0
            for name in first.keys():  # noqa: SIM118  # not a mapping
                apart = first.get_tensor(name).double() - second.get_tensor(name).double()
                squares += float(apart.square().sum())
    except (OSError, SafetensorError):
        return None
    return float(squares**0.5)
