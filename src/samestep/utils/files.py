"""Writing files so that a crash leaves the old content or the new, never half of it."""

import atexit
import errno
import hashlib
import os
import shutil
import stat
import tempfile
from functools import cache
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content: write aside, flush to disk, rename.

    Args:
        path: The file; its folder must exist.
        text: The new content.

    Raises:
        OSError: It cannot be written; the old content is intact.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        remove(aside)  # of a process before us with this number, or planted: never written through
        with aside.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def user_path(name: str | Path) -> Path:
    """A path with ``~`` replaced by the folder that it stands for, where there is one.

    Args:
        name: As a user or a row gives it. ``~nobody`` of no user, or ``~`` without a home, stays.

    Returns:
        The path.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def sync(path: Path) -> None:
    """Flush a file or the entries of a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read its bytes; refuses what is no file, such as a pipe, which would hang.

    Args:
        path: The file; a link to one is followed.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def remove(path: Path) -> None:
    """Delete a file, a link (not what it points to) or a folder with all that is in it, if there.

    Raises:
        OSError: It cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_tree(folder: Path) -> None:
    """Flush every file in a folder, and the folders' own entries, to disk."""
    for path in folder.iterdir():  # a glob would take a folder that cannot be read for empty
        if path.is_dir() and not path.is_symlink():
            sync_tree(path)
        elif not path.is_symlink():
            sync(path)
    sync(folder)


def replaced_name(path: Path) -> Path:
    """Where `replace_folder` keeps the former content of a path until the new one stands."""
    return path.with_name(f".{path.name}.old")


def replace_folder(path: Path, aside: Path) -> None:
    """Put a finished folder in the place of another, whose content stays under `replaced_name`.

    At every moment one of the two is whole under a name that `finish_replacing` knows.

    Args:
        path: Where the folder is to stand.
        aside: The finished folder, flushed to disk, beside it.

    Raises:
        OSError: It could not be put there; what was there is there still.
    """
    old = replaced_name(path)
    try:
        if path.is_dir():
            path.rename(old)
        aside.rename(path)
    except BaseException:
        finish_replacing(path)
        raise
    sync(path.parent)


def finish_replacing(path: Path) -> None:
    """Undo the first half of a `replace_folder` that went no further, as after a kill."""
    old = replaced_name(path)
    if old.is_dir() and not old.is_symlink() and not os.path.lexists(path):
        old.rename(path)
        sync(path.parent)


def cache_folder() -> Path:
    """Where samestep keeps what it can make again: $SAMESTEP_CACHE, or the user's cache folder."""
    given = os.environ.get("SAMESTEP_CACHE")
    if given:
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "samestep"
    except RuntimeError:  # a user without a home, as in some containers
        return _cache_of_this_process()


@cache
def _cache_of_this_process() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="samestep-cache-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def sha256_of(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


_ROOM = 2**25
"""Bytes that a report of any size fits into."""


def check_room(folder: Path) -> str:
    """Why a report could not be written into a folder; empty if it can. The folder is made.

    Args:
        folder: The folder.

    Returns:
        What is wrong.
    """
    probe = folder / f".room.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"room")
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror or error})"
    if free < _ROOM:
        return f"the disk of {folder} has {free / 2**20:.0f} MB left, of {_ROOM / 2**20:.0f} needed"
    return ""
