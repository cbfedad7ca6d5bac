"""Tokenised examples on disk, under a key of everything that they depend on."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from samestep.data.examples import Examples
from samestep.data.rows import Row
from samestep.errors import DataError

log = logging.getLogger("samestep")

_FORMAT = 1
"""To be raised when the same rows give other examples than before."""


def cache_key(
    rows: Sequence[Row], tokenizer: Any, *, columns: Iterable[str], settings: Mapping[str, Any]
) -> str:
    """A key that changes whenever the examples could.

    Args:
        rows: The rows.
        tokenizer: A fast tokenizer.
        columns: The columns that are read; others do not count.
        settings: All settings of the tokenisation.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        # Keys are not sorted: a template may print an object in the order that it has.
        digest.update(json.dumps(value, default=repr).encode())
        digest.update(b"\n")

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left behind by whoever used the tokenizer before; not in use here.
    backend.pop("truncation", None)
    backend.pop("padding", None)
    template = tokenizer.chat_template
    add([_FORMAT, version("transformers"), version("tokenizers"), type(tokenizer).__qualname__])
    add(backend)
    add([template, tokenizer.special_tokens_map, tokenizer.split_special_tokens])
    add(date.today().isoformat() if "strftime_now" in json.dumps(template) else None)
    add(settings)
    names = list(columns)
    for row in rows:
        add([row.values.get(name) for name in names])
    return digest.hexdigest()


def read_cache(path: Path) -> Examples | None:
    """Read a cache file.

    Args:
        path: A file that `write_cache` may have written.

    Returns:
        The examples; None if there is no file, or it is damaged (a warning says so).
    """
    if not path.exists():
        return None
    try:
        return Examples.load(path)
    except DataError as error:
        log.warning("token cache: %s; tokenising again", error)
        return None


def write_cache(path: Path, examples: Examples) -> None:
    """Write a cache file; without room or permission a warning says so, and the run goes on.

    Args:
        path: The file; its folder is made.
        examples: What to keep.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        examples.save(path)
    except OSError as error:
        log.warning("token cache: cannot write %s (%s)", path, error)
