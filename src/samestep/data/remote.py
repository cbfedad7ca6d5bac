"""Files of other file systems (s3://, hf://, https://), copied once into the cache by fsspec."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

from samestep.errors import DataError
from samestep.utils.files import cache_folder


def fetch_files(url: str) -> list[Path]:
    """Copies of the files that a URL or a pattern of URLs names, on this machine.

    A file is copied again when its file system says that it has changed.

    Args:
        url: Such as ``s3://bucket/rows/*.jsonl``, ``hf://datasets/owner/name/rows.parquet``.

    Returns:
        At least one path, in the order of their names.

    Raises:
        DataError: There is no such file, or it cannot be reached.
    """
    import fsspec  # type: ignore[import-untyped]

    try:
        system, place = fsspec.url_to_fs(url)
        names = sorted(system.glob(place)) if set("*?[") & set(place) else [place]
        names = [name for name in names if not system.isdir(name)]
        if not names:
            raise FileNotFoundError("no file is there by this name")
        return [_copy(system, name) for name in names]
    except ImportError as error:
        kind = url.partition("://")[0]
        raise DataError(f"{url}: files of {kind}:// need another package: {error}") from error
    except Exception as error:  # each file system raises kinds of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{url}: cannot be read ({type(error).__name__}: {reason})") from error


def _copy(system: Any, name: str) -> Path:
    """The copy of one file, made if it is not there."""
    version = system.ukey(name)
    digest = hashlib.sha256(f"{type(system).__name__} {name} {version}".encode()).hexdigest()
    target = cache_folder() / "downloads" / digest[:24] / name.rpartition("/")[2]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=target.parent)
        os.close(handle)
        try:
            system.get_file(name, aside)
            Path(aside).replace(target)
        finally:
            Path(aside).unlink(missing_ok=True)
    return target
