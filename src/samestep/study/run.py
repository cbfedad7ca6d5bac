"""A study from its spec to its results: prepare the rows, run what is not cached, collect."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from samestep.models.load import resolve_source
from samestep.study.arms import Arm, arm_label, expand_grid, group_title, reference_arms
from samestep.study.results import ArmResult, Results, Run, load_run
from samestep.study.rows import prepare_rows
from samestep.study.spec import StudySpec
from samestep.study.tasks import plan_tasks, run_tasks, threads_per_run
from samestep.study.training import Task, distance

Progress = Callable[[str], None]


def run_study(spec: StudySpec, out: Path, *, jobs: int, on_progress: Progress) -> Results:
    """Run a study; what an earlier call finished is not run again.

    Args:
        spec: The study.
        out: Its folder: ``rows/`` and ``runs/`` are kept there.
        jobs: Runs at a time.
        on_progress: Takes a line of progress.

    Returns:
        The results.

    Raises:
        ConfigError: The model cannot be used.
        DataError: The rows cannot be used.
        StepError: A run failed; finished ones are kept.
    """
    (out / "rows").mkdir(parents=True, exist_ok=True)
    (out / "runs").mkdir(exist_ok=True)
    model = resolve_source(spec.model)
    lengths = prepare_rows(spec, model, folder=out / "rows")
    arms = expand_grid(spec)
    tasks = plan_tasks(spec, model, out=out)
    notes = _run_missing(tasks, arms, jobs=jobs, on_progress=on_progress)
    return Results(
        name=spec.name,
        spec=_without_absolute_paths(spec.model_dump(mode="json")),
        machine=_describe_machine(jobs),
        versions={name: version(name) for name in ("samestep", "torch", "transformers")},
        lengths=lengths,
        arms=_collect(tasks, arms, cut_targets=spec.cut_targets),
        notes=notes,
    )


def _without_absolute_paths(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec with absolute paths cut to their names: results are passed on."""
    return {
        name: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for name, value in spec.items()
    }


def _describe_machine(jobs: int) -> dict[str, str | int]:
    return {
        "cores": os.cpu_count() or 1,
        "jobs": jobs,
        "threads a run": threads_per_run(jobs),
        "system": platform.system(),
        "processor": platform.machine(),
        "Python": platform.python_version(),
    }


def _run_missing(
    tasks: Sequence[Task], arms: Sequence[Arm], *, jobs: int, on_progress: Progress
) -> list[str]:
    """Run what the cache lacks; returns a note on each damaged file."""
    notes: list[str] = []
    missing: dict[str, Task] = {}
    for task in tasks:
        try:
            cached = load_run(task.result_file, task.key)
        except ValueError as error:
            cached = None
            name = _task_name(task, arms)
            notes.append(f"the cache entry of {name} was damaged: it was run again ({error})")
            on_progress(notes[-1])
            task.result_file.unlink()
        if cached is None:
            missing[task.key] = task
    num_finished = len(tasks) - len(missing)
    if num_finished:
        on_progress(f"{num_finished} of {len(tasks)} runs are cached")

    def on_finished(task: Task) -> None:
        nonlocal num_finished
        num_finished += 1
        run = _load_finished(task)
        outcome = f"evaluation loss {run.evaluations.loss[-1]:.4f}"
        if run.diverged is not None:
            outcome = f"diverged {run.diverged}"
        on_progress(f"[{num_finished}/{len(tasks)}] {_task_name(task, arms)}: {outcome}")

    run_tasks(missing.values(), on_finished, max_parallel=jobs)
    return notes


def _task_name(task: Task, arms: Sequence[Arm]) -> str:
    cut = f", {task.arm.cut:.0%} cut" if task.arm.cut else ""
    return f"{arm_label(task.arm, arms)}{cut}, seed {task.seed}"


def _load_finished(task: Task) -> Run:
    run = load_run(task.result_file, task.key)
    assert run is not None
    return run


def _collect(tasks: Sequence[Task], arms: Sequence[Arm], *, cut_targets: int) -> list[ArmResult]:
    """The finished runs by arm, each with its distance to the reference."""
    references = reference_arms(arms)
    finished = {(task.arm, task.seed): (task, _load_finished(task)) for task in tasks}
    return [
        ArmResult(
            label=arm_label(arm, arms),
            group=group_title(arm, arms, cut_targets=cut_targets),
            reference=references.get(arm.group) is arm,
            batch=arm.batch,
            split=arm.split,
            normalisation=arm.normalisation,
            lr=arm.lr,
            cut=arm.cut,
            runs=[
                _with_distance(finished, arm, seed=seed, reference=references.get(arm.group))
                for seed in arm.seeds
            ],
        )
        for arm in arms
    ]


def _with_distance(
    finished: Mapping[tuple[Arm, int], tuple[Task, Run]],
    arm: Arm,
    *,
    seed: int,
    reference: Arm | None,
) -> Run:
    """A run, with how far its weights ended from those of the reference with the same seed."""
    task, run = finished[arm, seed]
    if reference is None or (reference, seed) not in finished:
        return run
    reference_task, reference_run = finished[reference, seed]
    between = _distance_between_files(task.weights_file, reference_task.weights_file)
    if between is None or not reference_run.distance_from_init:
        return run
    return run.model_copy(update={"distance": between / reference_run.distance_from_init})


def _distance_between_files(first: Path, second: Path) -> float | None:
    """The 2-norm between two files of weights; None if one is missing or cannot be read."""
    try:
        with safe_open(first, framework="pt") as a, safe_open(second, framework="pt") as b:
            names = a.keys()
            return distance((a.get_tensor(name), b.get_tensor(name)) for name in names)
    except (OSError, SafetensorError):
        return None
