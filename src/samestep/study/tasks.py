"""The runs of a study, one for each arm and seed: planned, and run in processes of their own.

A process for each run, so that peak memory is each one's and a crash ends only one.
"""

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers.utils import logging

from samestep.errors import SamestepError, StepError
from samestep.study.arms import expand_grid, reference_arms
from samestep.study.results import FORMAT, save_run
from samestep.study.rows import rows_file
from samestep.study.spec import StudySpec
from samestep.study.training import Task, settings_content, train_arm, train_settings
from samestep.utils.files import sha256_of

_MODEL_FILES = (".json", ".safetensors", ".jinja", ".model", ".txt")


def plan_tasks(spec: StudySpec, model: str, *, out: Path) -> list[Task]:
    """Every run of a study.

    Args:
        spec: The study.
        model: What `samestep.models.load.resolve_source` made of the spec's model.
        out: The study's folder, its rows prepared.

    Returns:
        The tasks: seeds within arms, arms in the order of the spec.
    """
    arms = expand_grid(spec)
    references = reference_arms(arms)
    fingerprint = _model_fingerprint(model)
    rows = {
        cut: (rows_file(out / "rows", "train", cut=cut), rows_file(out / "rows", "eval", cut=cut))
        for cut in {arm.cut for arm in arms}
    }
    digests = {cut: [sha256_of(path) for path in paths] for cut, paths in rows.items()}
    tasks = []
    for arm in arms:
        # The undivided exact arm is what gradients are compared with: it has nothing to compare.
        undivided = references.get(arm.group) is arm and arm.micro_batch == arm.batch
        gradient_steps = () if undivided else spec.gradient_steps
        assert spec.eval_every is not None
        for seed in arm.seeds:
            settings = train_settings(
                spec, arm, seed=seed, model=model, rows=rows[arm.cut], out=out
            )
            key = _run_key(
                settings_content(settings),
                contents=[fingerprint, *digests[arm.cut]],
                normalisation=arm.normalisation,
                gradient_steps=gradient_steps,
                eval_every=spec.eval_every,
            )
            tasks.append(
                Task(
                    arm=arm,
                    seed=seed,
                    settings=settings,
                    gradient_steps=gradient_steps,
                    eval_every=spec.eval_every,
                    key=key,
                    folder=out / "runs",
                )
            )
    return tasks


def _model_fingerprint(model: str) -> str:
    """What stands for a model's content: digests of its files, or a Hub name and its commit."""
    folder = Path(model)
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix in _MODEL_FILES)
        return json.dumps([[path.name, sha256_of(path)] for path in files])
    cached = try_to_load_from_cache(model, "config.json")
    # .../snapshots/COMMIT/config.json
    return f"{model}@{Path(cached).parent.name if isinstance(cached, str) else 'unknown'}"


def _run_key(settings: dict[str, Any], **content: Any) -> str:
    """32 hexadecimal digits that change whenever the run could."""
    versions = [version(package) for package in ("samestep", "torch", "transformers")]
    everything = json.dumps([FORMAT, versions, settings, content], sort_keys=True)
    return hashlib.sha256(everything.encode()).hexdigest()[:32]


def run_tasks(
    tasks: Iterable[Task], on_finished: Callable[[Task], None], *, max_parallel: int
) -> None:
    """Run tasks, some at a time; each writes its result to its `Task.result_file`.

    After a failure the tasks that run are finished, and no other is started.

    Args:
        tasks: What to run, in order.
        on_finished: Called after each success.
        max_parallel: How many at a time.

    Raises:
        StepError: Some failed; says which and why.
    """
    context = _process_context()
    waiting = list(tasks)[::-1]
    running: dict[int, tuple[Any, Task]] = {}
    failures: list[str] = []
    try:
        while running or (waiting and not failures):
            while waiting and not failures and len(running) < max_parallel:
                task = waiting.pop()
                arguments = (task, threads_per_run(max_parallel))
                process = context.Process(target=_run_task, args=arguments, daemon=True)
                process.start()
                running[process.sentinel] = (process, task)
            ended = set(wait(list(running)))
            for sentinel in [sentinel for sentinel in running if sentinel in ended]:
                process, task = running.pop(sentinel)
                process.join()
                if process.exitcode == 0:
                    on_finished(task)
                else:
                    failures.append(_failure(process.exitcode, task))
    finally:
        for process, _ in running.values():
            process.terminate()
    if failures:
        raise StepError("a run failed (finished ones are kept): " + "; ".join(failures))


def threads_per_run(max_parallel: int) -> int:
    """Threads of each run: $OMP_NUM_THREADS, or an equal part of the cores.

    Args:
        max_parallel: Runs at a time.

    Returns:
        At least 1.
    """
    setting = os.environ.get("OMP_NUM_THREADS", "")
    return int(setting) if setting.isdigit() else max(1, (os.cpu_count() or 1) // max_parallel)


def _process_context() -> Any:
    """Children of a server that has imported everything: they start at once, without threads."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _run_task(task: Task, threads: int) -> None:
    # The parent ends its children itself; a Ctrl-C must not print a traceback from each.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    try:
        save_run(task.result_file, train_arm(task))
    except SamestepError as error:
        _error_file(task).write_text(str(error), encoding="utf-8")
        raise SystemExit(1) from None


def _failure(exit_code: int, task: Task) -> str:
    file = _error_file(task)
    if exit_code == 1 and file.exists():
        message = file.read_text(encoding="utf-8")
        file.unlink()
        return message
    if exit_code < 0:
        return f"killed by signal {-exit_code}" + (" (out of memory?)" if exit_code == -9 else "")
    return f"it ended with code {exit_code}; its traceback is above"


def _error_file(task: Task) -> Path:
    return task.result_file.with_suffix(".error")
