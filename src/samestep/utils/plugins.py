"""Objects of the user's own: what ``file.py:name`` or ``package.module:name`` names."""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from samestep.errors import ConfigError, SamestepError
from samestep.utils.files import user_path


def is_reference(text: str) -> bool:
    """Whether a setting names an object by ``file.py:name`` or ``package.module:name``."""
    return ":" in text


def load_object(
    reference: str, *, what: str, error: type[SamestepError] = ConfigError, hint: str = ""
) -> Any:
    """The object that a reference names.

    A file is run once a process, until it changes. It can import its neighbours.

    Args:
        reference: ``file.py:name``, or ``package.module:name``; without a name the module itself.
        what: The setting that holds the reference, to open messages.
        error: The class of the error to raise.
        hint: Added to the message where there is no such file.

    Returns:
        The object.

    Raises:
        SamestepError: Of that class: the file, the module or the name does not exist, or running
            it fails; shows its own error.
    """
    place, name, path, is_file = find_place(reference, what=what, error=error, hint=hint)
    try:
        module = _load_file(path.absolute()) if is_file else importlib.import_module(place)
    except Exception as cause:  # the user's code may raise anything
        if isinstance(cause, ModuleNotFoundError) and not is_file and _is_part(cause.name, place):
            raise error(f"{what}: there is no module {place!r} that can be imported") from None
        reason = f"{type(cause).__name__}: {cause}"
        raise error(f"{what}: {place} cannot be imported: {reason}") from cause
    if not name:
        return module
    try:
        return getattr(module, name)  # which a module may make only when it is asked for
    except AttributeError:
        public = [key for key in vars(module) if not key.startswith("_")]
        raise error(
            f"{what}: {place} has no {name!r}{nearest(name, public)}; it has: {', '.join(public)}"
        ) from None


def find_place(
    reference: str, *, what: str, error: type[SamestepError] = ConfigError, hint: str = ""
) -> tuple[str, str, Path, bool]:
    """Where a reference leads, found before anything is loaded.

    Args:
        reference: As `load_object` takes it.
        what: The setting that holds the reference, to open messages.
        error: The class of the error to raise.
        hint: Added to the message where there is no such file.

    Returns:
        The file or module as it is written, the name in it (empty: itself), the file's path, and
        whether it is a file.

    Raises:
        SamestepError: Of that class: it has another form, or there is no such file.
    """
    place, colon, name = reference.partition(":")
    if not place or (colon and not name):
        raise error(f"{what}: {reference!r} must be file.py:name or package.module:name")
    path = user_path(place)
    is_module = all(part.isidentifier() for part in place.split("."))
    is_file = place.endswith(".py") or not is_module or path.is_file()
    if is_file and not path.is_file():
        raise error(f"{what}: there is no file {place}{hint}")
    return place, name, path, is_file


def nearest(name: str, names: Iterable[str], *, cutoff: float = 0.6) -> str:
    """A hint at the most similar of some names, such as "; did you mean 'adamw'?"; or empty."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""


def _is_part(missing: str | None, module: str) -> bool:
    """Whether what could not be found is the module itself or a package around it."""
    return missing is not None and f"{module}.".startswith(f"{missing}.")


def _load_file(path: Path) -> ModuleType:
    return _run_file(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _run_file(path: Path, modified: int) -> ModuleType:
    """A file as a module; its name is the file's, so that its objects can be pickled."""
    name = path.stem
    taken = sys.modules.get(name)
    if taken is not None and not hasattr(taken, "_samestep_plugin"):
        name = f"samestep_plugin_{name}"  # never in the place of a module that others use
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    vars(module)["_samestep_plugin"] = True
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    sys.modules[name] = module  # dataclasses and pydantic look their modules up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
