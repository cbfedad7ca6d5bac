"""Where a run starts: at step 0, or at its last checkpoint, if that is of the same run."""

import logging
from pathlib import Path
from typing import Any

from samestep.data.stream_records import StreamRecords
from samestep.engine.collectives import gather_results, rank
from samestep.errors import ConfigError
from samestep.train import checkpoint
from samestep.train.bitwise import BitRun
from samestep.train.checkpoint_files import read_origin, step_folder
from samestep.train.origin import differences, origin_of
from samestep.train.progress import DataFingerprint, Progress
from samestep.train.run_data import training_mix
from samestep.train.run_folder import RunFolder
from samestep.train.settings.base import TrainSettings
from samestep.train.setup import TrainingSetup
from samestep.utils.sources import describe_source

log = logging.getLogger("samestep")


def current_origin(setup: TrainingSetup, settings: TrainSettings) -> dict[str, Any]:
    """What checkpoints keep of what the run depends on; rank 0 reads the files.

    Args:
        setup: The model and what it was loaded from.
        settings: The settings.

    Returns:
        ``settings``, as ``config.yaml`` has them, and ``files``, digests by what they are of.
    """
    files = gather_results(lambda: origin_of(settings, setup.model) if rank() == 0 else {})[0]
    mix = training_mix(setup.train, settings)
    if mix is not None:
        files["data: rows of each source"] = ", ".join(map(str, mix.sizes))
    return {"settings": settings.saved(), "files": files}


def first_progress(
    setup: TrainingSetup,
    settings: TrainSettings,
    *,
    folder: RunFolder,
    origin: dict[str, Any],
    bits: BitRun | None = None,
) -> Progress:
    """Where the run starts: at its last intact checkpoint if it is resumed, else at step 0.

    Args:
        setup: Its model and optimizer get what the checkpoint holds.
        settings: ``resume``, ``data``.
        folder: Where the checkpoints are.
        origin: Of `current_origin`.
        bits: Gets what the checkpoint holds of it.

    Returns:
        How far the run is.

    Raises:
        ConfigError: The rows, or what else the run depends on, are others than at the checkpoint.
        CheckpointError: No checkpoint can be read.
    """
    data = DataFingerprint.of(setup.train)
    path = checkpoint.newest_intact(folder.checkpoints) if settings.resume else None
    if path is None:
        if settings.resume:
            log.warning("resume: there is no checkpoint in %s: starting at step 0", folder.root)
        return Progress(step=0, tokens=0, seconds=0.0, skipped=0, data=data)
    _check_origin(path, origin["files"])
    if bits is not None:
        bits.restore(read_origin(path).get("bitwise"), path)
    progress = load_progress(path, setup)
    difference = progress.data.difference(data)
    if difference:
        raise ConfigError(
            f"resume: the training rows are not those of {path}: "
            f"{describe_source(settings.data)} or the tokenizer "
            f"has changed since ({difference}). Restore it, or start anew with --overwrite"
        )
    if isinstance(setup.train, StreamRecords) and progress.stream is not None:
        setup.train.restore(progress.stream)
    log.info("resuming after step %d, from %s", progress.step, path)
    return progress


def load_progress(path: Path, setup: TrainingSetup) -> Progress:
    """Put what a checkpoint holds in place.

    Args:
        path: Its folder.
        setup: Its model, optimizer and average get it.

    Returns:
        How far the run was.

    Raises:
        CheckpointError: It cannot be read.
    """
    average = None if setup.average is None else setup.average.tensors
    return checkpoint.load(
        *(path, setup.model),
        optimizer=setup.optimizer,
        average=average,
        objective=setup.objective.state,
    )


def load_best(
    progress: Progress, setup: TrainingSetup, *, settings: TrainSettings, folder: RunFolder
) -> None:
    """Put the weights of the best evaluation in place, at the end of a run that chooses by one.

    Args:
        progress: Of the run.
        setup: Its model gets what the checkpoint holds.
        settings: ``best``.
        folder: Where the checkpoints are.

    Raises:
        CheckpointError: The checkpoint of that step cannot be read.
    """
    choice = progress.choice
    if settings.best is None or choice.step is None:
        return
    if choice.step != progress.step:
        path = step_folder(folder.checkpoints, choice.step)
        load_progress(path, setup)
    early = f"; the run ended after step {progress.step} of {setup.steps}"
    log.info(
        *("best: %s %.6g after step %d, which becomes the model%s", settings.best, choice.value),
        *(choice.step, early if progress.step < setup.steps else ""),
    )


def _check_origin(path: Path, now: dict[str, str]) -> None:
    """Refuse to go on with other files than those that the run began with."""
    before = read_origin(path).get("files")
    if before is None:
        log.warning(
            "resume: %s is of an earlier version of samestep: whether the model's files have "
            "changed since is not known",
            path,
        )
        return
    changed = "\n  - ".join(["", *differences(before, now)])
    if changed:
        raise ConfigError(
            f"resume: what the run depends on is not what it was at {path}:{changed}\n"
            "Restore it, or start anew with --overwrite"
        )
