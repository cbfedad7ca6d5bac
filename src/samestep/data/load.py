"""Rows from wherever they are: files, folders, the Hub, a data set in memory."""

import difflib
import glob
import logging
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samestep.data.file_formats import READERS, reader_of, row_or_problem
from samestep.data.remote import fetch_files
from samestep.data.row_converters import Converter, convert_rows, resolve_row_format
from samestep.data.row_formats import RowFormat
from samestep.data.rows import Row, RowError, map_rows, raise_problems
from samestep.errors import DataError
from samestep.utils.files import user_path
from samestep.utils.hub import find_on_hub
from samestep.utils.plugins import nearest
from samestep.utils.sources import DataSource, Source, is_url

if TYPE_CHECKING:
    import datasets

log = logging.getLogger("samestep")

_EXTENSIONS = f"{', '.join(READERS)}, and those of text with .gz or .zst"


def load_rows(
    source: "Source | Path | datasets.Dataset | Sequence[Mapping[str, Any]]",
    *,
    split: str = "train",
    row_format: str | Converter | RowFormat | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Row]:
    """Read all rows of a source.

    Args:
        source: A .jsonl, .json, .csv, .tsv or .parquet file, text with .gz or .zst too; a folder
            of such files (taken in the order of their names; subfolders are not read, the log says
            so) or one that `Dataset.save_to_disk` wrote; a pattern such as ``data/*.jsonl``; the
            name of a data set on the Hub; a URL that fsspec opens; several of these, read in their
            order; a `datasets.Dataset`; or a list of mappings.
        split: Which split of a data set that has several.
        row_format: What converts each row to columns that are known: see
            `samestep.data.row_converters.resolve_row_format`. None: what each row is recognised as.
        columns: Columns that the source calls otherwise: known name to its name there.

    Returns:
        At least one row, in the order of the source.

    Raises:
        DataError: The source is missing or empty, or rows cannot be read or converted; lists every
            problem.
        ConfigError: ``row_format`` names nothing that converts rows.
    """
    converter = None if row_format is None else resolve_row_format(row_format)
    rows = _load(source, split, columns)
    if converter is not None:
        rows = convert_rows(rows, converter)
    return convert_rows(rows)


def _load(
    source: "Source | Path | datasets.Dataset | Sequence[Mapping[str, Any]]",
    split: str,
    columns: Mapping[str, str] | None,
) -> list[Row]:
    if isinstance(source, (str, Path, DataSource)):
        return _from_sources([source], split, columns)
    if isinstance(source, Sequence):
        if source and all(isinstance(each, Row) for each in source):
            return list(source)  # rows of a stream, read and renamed
        names = [each for each in source if isinstance(each, (str, Path, DataSource))]
        if names and len(names) == len(source):
            return _from_sources(names, split, columns)
        return rename_columns(_in_memory(source, ""), columns)
    if isinstance(source, Mapping):
        raise DataError(
            f"the data set has the splits {', '.join(map(str, source))}: pass one of them"
        )
    # Whoever holds a Dataset has imported datasets already: no need to pay for it here.
    if "datasets" in sys.modules:
        import datasets

        if isinstance(source, datasets.Dataset):
            return rename_columns(_in_memory(source.with_format(None), ""), columns)
    raise DataError(
        f"data of type {type(source).__name__}: give a path, the name of a Hub data set, "
        "a datasets.Dataset (not a streamed one) or a list of mappings"
    )


def _from_sources(
    sources: Sequence[str | Path | DataSource], split: str, columns: Mapping[str, str] | None
) -> list[Row]:
    """The rows of several sources, one after another; the problems of all of them at once."""
    rows: list[Row] = []
    problems: list[str] = []
    for number, source in enumerate(sources):
        try:
            found = _from_source(source, split, columns)
        except DataError as error:
            problems.append(str(error))
            continue
        rows += [replace(row, source=number) for row in found] if number else found
    raise_problems(problems)
    return rows


def _from_source(
    source: str | Path | DataSource, split: str, columns: Mapping[str, str] | None
) -> list[Row]:
    if not isinstance(source, DataSource):
        return rename_columns(_from_name(source, split), columns)
    rows = _from_name(source.path, source.split or split, source)
    return rename_columns(rows, columns if source.columns is None else source.columns)


def rename_columns(rows: list[Row], columns: Mapping[str, str] | None) -> list[Row]:
    """The rows with columns under the names that are known.

    Args:
        rows: Of a source.
        columns: Known name to that of the source; None: they have the known ones.

    Returns:
        The rows.

    Raises:
        DataError: Rows have no such columns.
    """
    if not columns:
        return rows
    theirs = set(columns.values())

    def rename(row: Row) -> Row:
        missing = [name for name in theirs if name not in row.values]
        if missing:
            raise RowError(
                f"columns: there is no {missing[0]!r}{nearest(missing[0], row.values)} (the row "
                f"has {', '.join(row.values)})"
            )
        kept = {name: value for name, value in row.values.items() if name not in theirs}
        return replace(
            row, values={**kept, **{name: row.values[old] for name, old in columns.items()}}
        )

    return map_rows(rows, rename)


def _from_name(source: str | Path, split: str, named: DataSource | None = None) -> list[Row]:
    path = user_path(source)
    local = isinstance(source, Path) or is_url(source) or path.exists() or _looks_like_path(source)
    if named is not None and local:
        _refuse_parts(named, path)
    if isinstance(source, str) and is_url(source):
        return _from_files(fetch_files(source))
    if path.is_dir() and _is_saved(path):
        return _from_saved(path, split)
    files = _local_files(source, path)
    if files is not None:
        return _from_files(files)
    return _from_hub(str(source), split, config=None if named is None else named.config)


def _local_files(source: str | Path, path: Path) -> list[Path] | None:
    """The files that a path names: itself, those of a folder, or of a pattern; None: it is none."""
    if path.is_dir():
        return _data_files(path)
    if path.exists():
        return [path]
    if glob.has_magic(str(path)):
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not files:
            raise DataError(f"{source}: no file matches this pattern")
        return [file for file in files if not file.is_dir()] or _none_is_a_file(source)
    if isinstance(source, Path) or _looks_like_path(source):
        raise DataError(f"{source}: no such file{_nearest(path)}")
    return None


def _is_saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote a folder."""
    names = {entry.name for entry in folder.iterdir()}
    return "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= names


def files_of(source: DataSource) -> list[Path] | None:
    """The files of a source that is read row by row.

    Args:
        source: As settings name it.

    Returns:
        At least one; None where the library ``datasets`` is what reads it.

    Raises:
        DataError: There are none.
    """
    if is_url(source.path):
        return fetch_files(source.path)
    path = user_path(source.path)
    if path.is_dir() and _is_saved(path):
        return None
    files = _local_files(source.path, path)
    if files is not None:
        _refuse_parts(source, path)
    return files


def hub_stream(source: DataSource) -> Any:
    """A data set that the library ``datasets`` reads row by row.

    Args:
        source: A folder of `Dataset.save_to_disk`, or a name of the Hub.

    Returns:
        A `datasets.IterableDataset`, at its beginning.

    Raises:
        DataError: It cannot be loaded.
    """
    import datasets

    split, path = source.split or "train", user_path(source.path)
    if path.is_dir():
        return _saved(path, split).to_iterable_dataset()
    named = {} if source.config is None else {"name": source.config}
    try:
        return datasets.load_dataset(source.path, **named, split=split, streaming=True)
    except Exception as error:  # the Hub client raises many kinds, all meaning "not loaded"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{source.path}: the split {split!r} of a data set of this name cannot be streamed "
            f"from the Hub ({reason})"
        ) from error


def _refuse_parts(source: DataSource, path: Path) -> None:
    """A file has neither configurations nor splits, and a folder of ``save_to_disk`` has splits."""
    saved = (path / "dataset_dict.json").exists()
    given = [name for name in ("config", "split") if getattr(source, name) is not None]
    wrong = [name for name in given if name == "config" or not saved]
    if wrong:
        raise DataError(
            f"{source.path}: {' and '.join(wrong)} belong to data sets of the Hub, and this is a "
            "path: leave them out"
        )


def _none_is_a_file(source: str | Path) -> list[Path]:
    raise DataError(f"{source}: this pattern matches folders alone; add /*.jsonl, say")


def _from_saved(folder: Path, split: str) -> list[Row]:
    """The rows of a folder that `Dataset.save_to_disk` wrote."""
    return _in_memory(_saved(folder, split), f"{folder.name} ")


def _saved(folder: Path, split: str) -> "datasets.Dataset":
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # damaged in many ways, all meaning "not loaded"
        raise DataError(f"{folder}: written by save_to_disk, but damaged: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise DataError(
                f"{folder}: it has the splits {', '.join(map(str, data))} and no {split!r}: give "
                f"the folder of one of them, such as {folder / str(next(iter(data), ''))}"
            )
        data = data[split]
    return data.with_format(None)


def _looks_like_path(source: str) -> bool:
    """Whether a name cannot be one of the Hub, which are "name" or "owner/name"."""
    return (
        source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or "\\" in source
        or reader_of(Path(source)) is not None
    )


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _data_files(folder: Path) -> list[Path]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file() and reader_of(entry) is not None]
    others = [entry.name + ("/" if entry.is_dir() else "") for entry in entries]
    if not files:
        content = f"it has {', '.join(others[:5])}" if others else "it is empty"
        raise DataError(
            f"{folder}: no data file in this folder ({content}); accepted: {_EXTENSIONS}. "
            "Subfolders are not read: give one of them, or a pattern such as "
            f"{folder}/**/*.jsonl"
        )
    ignored = [name for name in others if name not in {file.name for file in files}]
    if ignored:
        more = ", ..." if len(ignored) > 5 else ""
        log.warning("%s: not read: %s%s", folder, ", ".join(ignored[:5]), more)
    return files


def _from_files(files: Sequence[Path]) -> list[Row]:
    rows: list[Row] = []
    problems: list[str] = []
    for path in files:
        reader = reader_of(path)
        if reader is None:
            problems.append(f"{path}: unknown extension {path.suffix!r}; accepted: {_EXTENSIONS}")
            continue
        before, found = len(rows), list[str]()
        try:
            _sort_out(reader(path), rows, problems=found)
        except (OSError, EOFError, zlib.error) as error:
            found.append(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})")
        if len(rows) == before and not found:
            found.append(f"{path}: empty, it has no rows")
        if len(rows) == before and len(found) > 4:  # the file is at fault, not its rows
            found = [found[0], f"{path.name}: none of its {len(found)} lines can be read as a row"]
        problems += found
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


def _from_hub(name: str, split: str, *, config: str | None = None) -> list[Row]:
    import datasets

    if not datasets.config.HF_HUB_OFFLINE:  # else a cache of its own may have it
        try:
            find_on_hub(name, kind="dataset")
        except LookupError as error:
            near = _nearest(Path(name)) if Path(name).parent.is_dir() else ""
            raise DataError(
                f"{name} cannot be loaded: there is no such file or folder here, and {error}{near}"
            ) from None
    named = {} if config is None else {"name": config}
    try:
        data = datasets.load_dataset(name, **named, split=split)
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
