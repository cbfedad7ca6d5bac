"""Code of the user's: what ``file.py:name`` or ``package.module:name`` names."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from samestep.errors import ConfigError, SamestepError


def load_object(
    reference: str, *, what: str, error: type[SamestepError] = ConfigError, hint: str = ""
) -> Any:
    """The object that a reference names.

    Args:
        reference: ``file.py:name``, or ``package.module:name``; without a name the module itself.
        what: The setting that it is for, to open the error messages.
        error: The kind of error to raise.
        hint: Added to the message where there is no such file.

    Returns:
        The object.

    Raises:
        SamestepError: Of that kind: the file, the module or the name is not there, or
            running it fails; shows its own error.
    """
    path, _, name = reference.partition(":")
    is_name = all(part.isidentifier() for part in path.split("."))
    is_file = path.endswith(".py") or not is_name or Path(path).is_file()
    if is_file and not Path(path).expanduser().is_file():
        raise error(f"{what}: there is no file {path}{hint}")
    try:
        module = _run_file(Path(path).expanduser()) if is_file else importlib.import_module(path)
    except Exception as failure:  # the user's code may raise anything
        reason = f"{type(failure).__name__}: {failure}"
        raise error(f"{what}: {path} cannot be imported: {reason}") from failure
    if not name:
        return module
    try:
        return getattr(module, name)  # which a module may make on access
    except AttributeError:
        public = ", ".join(key for key in vars(module) if not key.startswith("_"))
        raise error(f"{what}: {path} has no {name!r}; it has: {public}") from None


def _run_file(path: Path) -> ModuleType:
    """A file as a module that can import its neighbours, and whose objects can be pickled."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
