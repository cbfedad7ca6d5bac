"""Settings that name files: what is missing is said before anything heavy is imported."""

from pathlib import Path
from typing import Any, Literal

from samestep.train.settings.base import TrainSettings
from samestep.utils.adapter_folder import is_adapter, read_adapter
from samestep.utils.files import user_path
from samestep.utils.plugins import nearest
from samestep.utils.sources import DataSource, is_url

_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".zst", ".gguf")
"""Endings that no name of the Hub has."""


_MODELS = ("model", "tokenizer", "reference_model", "teacher")
_DATA = ("data", "eval_data")


def missing_paths(settings: TrainSettings) -> list[str]:
    """A line for each setting that names a file or folder that is not there.

    What a file holds is not looked at, and names that may be of the Hub are left alone.

    Args:
        settings: Finalized settings.

    Returns:
        The lines; none if everything that must be there is.
    """
    given = {name: getattr(settings, name, None) for name in (*_MODELS, *_DATA)}
    given |= {f"{name}: the base of {given[name]}": _base(given[name]) for name in _MODELS}
    return [
        f"{name}: there is no {_kind(value)} {value}{_near(user_path(value))}"
        for name, values in given.items()
        for value in texts_of(values)
        if _looks_like_a_path(value) and not user_path(value).exists()
    ]


def hub_names(settings: TrainSettings) -> list[tuple[str, str, Literal["model", "dataset"]]]:
    """The settings that can only name something on the Hub: no path, and nothing here.

    Args:
        settings: Finalized settings.

    Returns:
        Field, name and kind of each.
    """
    return [
        (field, value, "dataset" if field in _DATA else "model")
        for field in (*_MODELS, *_DATA)
        for value in texts_of(getattr(settings, field, None))
        if not _looks_like_a_path(value)
        and not Path(value).exists()
        and not _is_pattern(value)
        and not is_url(value)
    ]


def _base(model: str | None) -> str | None:
    """The base of a folder of adapters, if it is one."""
    if model is None or not is_adapter(model):
        return None
    return str(read_adapter(model)["base_model_name_or_path"])


def texts_of(value: Any) -> list[str]:
    """The names that a setting holds: itself, or those in its lists and mappings.

    Args:
        value: Any value of a setting.

    Returns:
        The texts.
    """
    if isinstance(value, DataSource):
        return [value.path]
    if isinstance(value, dict):
        value = [value["path"]] if "path" in value else list(value.values())
    if isinstance(value, list | tuple):
        return [text for each in value for text in texts_of(each)]
    return [value] if isinstance(value, str) else []


def _looks_like_a_path(value: str) -> bool:
    if _is_pattern(value) or is_url(value):
        return False
    return value.endswith(_FILES) or value.startswith((".", "/", "~")) or value.count("/") > 1


def _is_pattern(value: str) -> bool:
    return bool(set("*?[") & set(value))


def _kind(value: str) -> str:
    return "file" if value.endswith(_FILES) else "folder"


def _near(path: Path) -> str:
    """The most similar name beside it, or the first folder of the way that is not there."""
    if not path.parent.is_dir():
        there = next(folder for folder in (*path.parents,) if folder.is_dir())
        return f" ({there.resolve()} is there)"
    return nearest(path.name, (each.name for each in path.parent.iterdir()))
