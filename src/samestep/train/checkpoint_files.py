"""Checkpoints as folders: which count, whether one is whole, putting one in its place, pruning.

A checkpoint is written under ``.step-N.tmp``. If step N is saved already (a run that was resumed
and stopped before its next step), the former one is kept as ``.step-N.old`` until the new one has
its name. So a kill at any moment leaves a whole one under one of the three names, and `recover`
puts it where it belongs. Names in a checkpoint's list of files are fixed: none leads elsewhere.
"""

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from samestep.errors import CheckpointError
from samestep.utils.files import (
    finish_replacing,
    open_regular,
    remove,
    replace_folder,
    replaced_name,
    sha256_of,
    sync_tree,
)

log = logging.getLogger("samestep")

FORMAT = 2

STATE = "state.txt"
"""The file of everything that is no tensor, with the checksums of the others."""

_STEP = re.compile(r"step-([0-9]{8})")
_UNFINISHED = re.compile(r"\.(step-[0-9]{8})\.(?:tmp|old)")
_SHARD = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return folder / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step-"))


def aside_of(checkpoint: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return checkpoint.with_name(f".{checkpoint.name}.tmp")


def all_checkpoints(folder: Path) -> list[Path]:
    """The folders of checkpoints by step; other names, files and links do not count."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _STEP.fullmatch(path.name) and _own(path))


def _own(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def write_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Write what is no tensor, after its own checksum."""
    text = json.dumps(state)
    (checkpoint / STATE).write_text(f"{_digest(text)} {text}", encoding="utf-8")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `write_state` has written.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not as it was written, or of a format that this version cannot read.
    """
    path = checkpoint / STATE
    if path.is_symlink():
        raise ValueError(f"{STATE} is a link")
    with open_regular(path) as file:
        digest, _, text = file.read().decode("utf-8").partition(" ")
    if digest != _digest(text):
        raise ValueError(f"{STATE} does not match its checksum")
    state: dict[str, Any] = json.loads(text)
    if state["format"] != FORMAT:
        raise ValueError(f"format {state['format']}, not {FORMAT}")
    return state


def read_origin(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint was saved with as ``origin``; empty in those of earlier versions.

    Raises:
        CheckpointError: The checkpoint cannot be read.
    """
    try:
        origin: dict[str, Any] = read_state(checkpoint).get("origin", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {error}") from error
    return origin


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def damage(checkpoint: Path, *, part: slice = slice(None)) -> str:
    """What is wrong with a checkpoint's files; empty if nothing is.

    Args:
        checkpoint: The folder; files that are not in its list are not looked at.
        part: Which of its files to read; the default is all of them.

    Returns:
        The first problem.
    """
    try:
        state = read_state(checkpoint)
        name = f"step-{state['progress']['step']:08d}"
        if name not in (checkpoint.name, *_UNFINISHED.findall(checkpoint.name)):
            return f"it is of {name}"
        for shard, digest in sorted(state["files"].items())[part]:
            if not _SHARD.fullmatch(shard):
                return f"{shard!r} is not the name of a checkpoint's file"
            if (checkpoint / shard).is_symlink():
                return f"{shard} is a link"
            if sha256_of(checkpoint / shard) != digest:
                return f"{shard} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def put_in_place(checkpoint: Path) -> None:
    """Give a finished checkpoint its name, then drop the one that it replaces.

    Args:
        checkpoint: Where it is to stand; it was written to `aside_of` that.

    Raises:
        OSError: It does not stand there; what stood there does still.
    """
    sync_tree(aside_of(checkpoint))
    replace_folder(checkpoint, aside_of(checkpoint))
    _drop_replaced(checkpoint)


def _drop_replaced(checkpoint: Path) -> None:
    """Delete the former checkpoint of a step; files that no run wrote move to the new one."""
    old = replaced_name(checkpoint)
    try:
        if not _own(old):
            old.unlink(missing_ok=True)
            return
        _remove_written(old)
        for foreign in old.iterdir() if old.is_dir() else ():
            foreign.rename(checkpoint / foreign.name)
        if old.is_dir():
            old.rmdir()
    except OSError as error:
        log.warning("%s, which %s replaces, is left behind: %s", old, checkpoint.name, error)


def recover(folder: Path) -> None:
    """Finish or undo what a kill has left half done.

    Args:
        folder: Of the checkpoints.

    Raises:
        OSError: It cannot be done.
    """
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    steps = sorted({found[1] for found in map(_UNFINISHED.fullmatch, names) if found})
    for checkpoint in (folder / name for name in steps):
        aside = aside_of(checkpoint)
        if not checkpoint.exists() and _own(aside) and not damage(aside):
            sync_tree(aside)
            replace_folder(checkpoint, aside)
            log.info("%s was written whole before the run was killed: it counts", checkpoint)
        finish_replacing(checkpoint)
        remove(aside)
        _drop_replaced(checkpoint)


def prune(folder: Path, *, step: int, keep: int, best: int | None = None) -> None:
    """Delete all but the newest checkpoints up to a step, and the best.

    What no run wrote stays, and so does what is of later steps: not this run's past.

    Args:
        folder: Of the checkpoints.
        step: The newest to keep.
        keep: How many of the newest to keep.
        best: The step of one that stays, however old.
    """
    try:
        newest = step_folder(folder, step).name
        spared = None if best is None else step_folder(folder, best).name
        past = [path for path in all_checkpoints(folder) if path.name <= newest]
        for old in past[:-keep]:
            if old.name != spared:
                _remove_written(old)
    except OSError as error:
        log.warning("an older checkpoint could not be deleted: %s", error)


def remove_checkpoints(folder: Path) -> None:
    """Delete all checkpoints that a run wrote; what it did not write stays.

    Args:
        folder: Of the checkpoints.
    """
    try:
        for checkpoint in all_checkpoints(folder):
            _remove_written(checkpoint)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        log.warning("a checkpoint could not be deleted: %s", error)


def _remove_written(checkpoint: Path) -> None:
    """Delete the files that a run has written, and the folder if nothing else is in it."""
    written = {path.name for path in checkpoint.iterdir() if _SHARD.fullmatch(path.name)}
    try:
        written &= read_state(checkpoint)["files"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        log.debug("%s: no list of files; those named like a run's are deleted", checkpoint)
    for name in (STATE, *sorted(written)):
        (checkpoint / name).unlink(missing_ok=True)
    if not any(checkpoint.iterdir()):
        checkpoint.rmdir()
