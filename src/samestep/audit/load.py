"""From what the user has, a file or an object, to a subject."""

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from samestep.audit.adapters.loop import LoopSubject
from samestep.audit.adapters.names import LoopNames
from samestep.audit.subject import Subject
from samestep.errors import CheckError


def load_subject(reference: str) -> Subject:
    """The subject in a Python file.

    Args:
        reference: ``FILE.py`` (its own names are the custom loop, or ``make_trainer``), or
            ``FILE.py:NAME`` for a class, a factory of trainers or another object in it.

    Returns:
        The subject.

    Raises:
        CheckError: The file or the name is missing, or holds no subject; the file's own error is
            shown if it cannot be imported.
    """
    path, _, name = reference.partition(":")
    module = _import(Path(path))
    if not name:
        return as_subject(module, name=Path(path).stem)
    try:
        found = getattr(module, name)  # which the module may make only when it is asked for
    except AttributeError:
        public = ", ".join(key for key in vars(module) if not key.startswith("_"))
        raise CheckError(f"{path} has no {name!r}; it has: {public}") from None
    return as_subject(found, name=name)


def as_subject(source: Any, *, name: str | None = None) -> Subject:
    """A subject of an object.

    Args:
        source: A module, class, instance or mapping with the names of a custom loop or with
            ``make_trainer``; such a factory itself; or a subject.
        name: For the report.

    Returns:
        The subject.

    Raises:
        CheckError: It is none of these; lists the names that are missing.
    """
    label = name or str(getattr(source, "__name__", type(source).__name__))
    if inspect.isclass(source):
        source = source()
    if isinstance(source, Subject):
        found: Subject = source
        return found
    factory = _factory(source)
    if factory is not None:
        return _trainer(factory, name=label)
    return LoopSubject(LoopNames.of(source), name=label)


def _factory(source: Any) -> Callable[..., Any] | None:
    """The factory of trainers that an object is, or has under the name ``make_trainer``."""
    if inspect.isroutine(source) or isinstance(source, functools.partial):
        found: Callable[..., Any] = source
        return found
    if isinstance(source, Mapping):
        return source.get("make_trainer")
    return getattr(source, "make_trainer", None)


def _trainer(factory: Callable[..., Any], *, name: str) -> Subject:
    # Imports the trainers' libraries, which other subjects do not need.
    from samestep.audit.adapters.trainer import TrainerSubject

    return TrainerSubject(factory, name=name)


def _import(path: Path) -> ModuleType:
    if not path.is_file():
        raise CheckError(f"there is no file {path}; `samestep check --init` writes one to start")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise CheckError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CheckError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module
