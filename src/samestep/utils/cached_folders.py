"""Folders in the cache: made once, whole or not at all, by however many runs at a time."""

import atexit
import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from samestep.utils.files import open_regular, sync_tree

_log = logging.getLogger("samestep")

_LIST = "samestep-files.json"
"""The file that lists the others with their sizes; written last."""


def cached_folder(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder that is made once, and found by the calls that follow.

    A cache can fail in one way only, as if it were not there: a folder that is not whole is made
    anew and replaced, and where none can be kept, one among temporary files serves this process.

    Args:
        folder: Where it is kept.
        make: Fills an empty folder.

    Returns:
        The folder, or another with the same content.

    Raises:
        Exception: What ``make`` raises; nothing is left then.
    """
    if _is_whole(folder):
        return folder
    with _unfinished_folder(folder) as unfinished:
        make(unfinished)
        sizes = {path.name: path.stat().st_size for path in unfinished.iterdir()}
        (unfinished / _LIST).write_text(json.dumps(sizes), encoding="utf-8")
        sync_tree(unfinished)
        return _put_in_place(unfinished, folder)


def _is_whole(folder: Path) -> bool:
    """Whether every file of a folder is there, and as long as it was written."""
    try:
        with open_regular(folder / _LIST) as file:
            sizes = json.loads(file.read())
        return bool(sizes) and all(
            (folder / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return False


@contextmanager
def _unfinished_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside another, or, where none can be made, among temporary files.

    It is locked while the block runs, by which others know it from one that a kill has left.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        unfinished, descriptor = _new_folder(f".{folder.name}.", folder.parent)
    except OSError as error:
        _log.warning("the cache cannot be written (%s): what is made is not kept", error)
        unfinished, descriptor = _new_folder("samestep-", None)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def _new_folder(prefix: str, parent: Path | None) -> tuple[Path, int]:
    """A new, locked folder, and the descriptor that holds its lock."""
    while True:
        unfinished = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            descriptor = os.open(unfinished, os.O_RDONLY)
        except FileNotFoundError:  # taken for abandoned
            continue
        if _lock(descriptor) and unfinished.is_dir():
            return unfinished, descriptor
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock a new folder; False where another has, who takes it for abandoned and deletes it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _remove_abandoned(folder: Path) -> None:
    """Delete what kills have left of the making of a folder."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        with suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(descriptor)


def _put_in_place(unfinished: Path, folder: Path) -> Path:
    """Give a whole folder its name, unless another run was first."""
    for _ in range(3):
        with suppress(OSError):
            unfinished.rename(folder)
            return folder
        if _is_whole(folder):  # it has the same content
            shutil.rmtree(unfinished, ignore_errors=True)
            return folder
        with suppress(OSError):  # not whole: out of the way
            broken = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            folder.rename(broken / folder.name)
            shutil.rmtree(broken, ignore_errors=True)
    atexit.register(shutil.rmtree, unfinished, ignore_errors=True)
    return unfinished
