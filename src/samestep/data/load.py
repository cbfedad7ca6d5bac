"""Rows from wherever they are: files, folders, the Hub, a data set in memory."""

import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samestep.data.file_formats import READERS, row_or_problem
from samestep.data.row_converters import Converter, convert_rows, resolve_row_format
from samestep.data.row_formats import RowFormat
from samestep.data.rows import Row, raise_problems
from samestep.errors import DataError
from samestep.utils.hub import find_on_hub

if TYPE_CHECKING:
    import datasets

_EXTENSIONS = ", ".join(READERS)


def load_rows(
    source: "str | Path | datasets.Dataset | Sequence[Mapping[str, Any]]",
    *,
    split: str = "train",
    row_format: str | Converter | RowFormat | None = None,
) -> list[Row]:
    """Read all rows of a source.

    Args:
        source: A .jsonl, .json, .csv or .parquet file; a folder of such files (taken in the
            order of their names; subfolders are not read); the name of a data set on the Hub;
            a `datasets.Dataset`; or a list of mappings.
        split: Which split of a Hub data set.
        row_format: What converts each row to columns that are known: see
            `samestep.data.row_converters.resolve_row_format`. None: what each row is recognised as.

    Returns:
        At least one row, in the order of the source.

    Raises:
        DataError: The source is missing or empty, or rows cannot be read or converted; lists every
            problem.
        ConfigError: ``row_format`` names nothing that converts rows.
    """
    converter = None if row_format is None else resolve_row_format(row_format)
    rows = _load(source, split)
    if converter is not None:
        rows = convert_rows(rows, converter)
    return convert_rows(rows)


def _load(
    source: "str | Path | datasets.Dataset | Sequence[Mapping[str, Any]]", split: str
) -> list[Row]:
    if isinstance(source, (str, Path)):
        return _from_name(source, split)
    if isinstance(source, Sequence):
        return _in_memory(source, "")
    if isinstance(source, Mapping):
        raise DataError(
            f"the data set has the splits {', '.join(map(str, source))}: pass one of them"
        )
    # Whoever holds a Dataset has imported datasets already: no need to pay for it here.
    if "datasets" in sys.modules:
        import datasets

        if isinstance(source, datasets.Dataset):
            return _in_memory(source.with_format(None), "")
    raise DataError(
        f"data of type {type(source).__name__}: give a path, the name of a Hub data set, "
        "a datasets.Dataset (not a streamed one) or a list of mappings"
    )


def _from_name(source: str | Path, split: str) -> list[Row]:
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_files(_data_files(path))
    if path.exists():
        return _from_files([path])
    if isinstance(source, Path) or _looks_like_path(source):
        raise DataError(f"{source}: no such file{_nearest(path)}")
    return _from_hub(source, split)


def _looks_like_path(source: str) -> bool:
    """Whether a name cannot be one of the Hub, which are "name" or "owner/name"."""
    return (
        source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or "\\" in source
        or Path(source).suffix.lower() in READERS
    )


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _data_files(folder: Path) -> list[Path]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    names = {entry.name for entry in entries}
    if {"state.json", "dataset_info.json"} <= names:
        raise DataError(
            f"{folder}: written by Dataset.save_to_disk; pass datasets.load_from_disk({folder!s}) "
            "in Python, or write it with Dataset.to_parquet"
        )
    files = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in READERS]
    if not files:
        content = f"it has {', '.join(sorted(names)[:5])}" if names else "it is empty"
        raise DataError(
            f"{folder}: no data file in this folder ({content}); accepted: {_EXTENSIONS}"
        )
    return files


def _from_files(files: Sequence[Path]) -> list[Row]:
    rows: list[Row] = []
    problems: list[str] = []
    for path in files:
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            problems.append(f"{path}: unknown extension {path.suffix!r}; accepted: {_EXTENSIONS}")
            continue
        before = len(rows) + len(problems)
        try:
            _sort_out(reader(path), rows, problems=problems)
        except OSError as error:
            problems.append(f"{path}: cannot be read ({error.strerror or error})")
        if len(rows) + len(problems) == before:
            problems.append(f"{path}: empty, it has no rows")
    raise_problems(problems)
    return rows


def _in_memory(values: Iterable[Any], prefix: str) -> list[Row]:
    rows: list[Row] = []
    problems: list[str] = []
    numbered = (row_or_problem(value, f"{prefix}row {at}") for at, value in enumerate(values, 1))
    _sort_out(numbered, rows, problems=problems)
    raise_problems(problems)
    if not rows:
        raise DataError(f"{prefix or 'the data set '}has no rows")
    return rows


def _sort_out(results: Iterable[Row | str], rows: list[Row], *, problems: list[str]) -> None:
    for result in results:
        if isinstance(result, Row):
            rows.append(result)
        else:
            problems.append(result)


def _from_hub(name: str, split: str) -> list[Row]:
    import datasets

    if not datasets.config.HF_HUB_OFFLINE:  # else a cache of its own may have it
        try:
            find_on_hub(name, kind="dataset")
        except LookupError as error:
            near = _nearest(Path(name)) if Path(name).parent.is_dir() else ""
            raise DataError(
                f"{name} cannot be loaded: there is no such file or folder here, and {error}{near}"
            ) from None
    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as error:  # the Hub client raises many kinds, all meaning "not loaded"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        offline = datasets.config.HF_HUB_OFFLINE
        raise DataError(
            f"{name}: no such file or folder, and the split {split!r} of a data set of this name "
            f"cannot be loaded from the Hub ({'offline mode is on; ' if offline else ''}{reason})"
            f"{_nearest(Path(name)) if Path(name).parent.is_dir() else ''}. "
            "Give an existing name and split, or a local path such as ./data/train.jsonl"
        ) from error
    return _in_memory(data, f"{name}[{split}] ")
