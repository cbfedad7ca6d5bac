"""Where a subject's code stands, and the hash of every file of the user's that it consists of."""

import ast
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_OURS = Path(__file__).resolve().parents[1]
NO_FILE = "; `samestep check --init` writes one to start"
"""What to do, for a message that there is no such file of a subject."""
_NAMES = ("make_trainer", "step", "train")
"""What a file is a subject by, if no name in it is given."""


def is_own(file: str) -> bool:
    """Whether a file is the user's: no part of samestep, of Python, or of an installed package."""
    path = Path(file)
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    library = path.is_relative_to(sysconfig.get_path("stdlib"))
    return not (file.startswith("<") or installed or library or path.is_relative_to(_OURS))


def describe_source(reference: str) -> dict[str, Any]:
    """The code of a subject that has been loaded in this process.

    Args:
        reference: ``FILE.py[:NAME]`` or ``package.module[:NAME]``.

    Returns:
        ``file`` and ``line``, where it stands (None if that cannot be seen), and ``files``: the
        SHA-256 of each file of the user's that is loaded, by its path from the subject's folder.
    """
    place, _, name = reference.partition(":")
    file = _file_of(place)
    if file is None:
        return {"file": None, "line": None, "files": {}}
    loaded = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    files = {Path(each).resolve() for each in loaded if each and is_own(each)} | {file}
    hashes = hash_files(files)
    base = file.parent
    relative = {_relative(path, base): hashes[path] for path in sorted(hashes)}
    return {"file": str(file), "line": line_of(file, name), "files": relative}


def hash_files(files: Iterable[Path]) -> dict[Path, str]:
    """The SHA-256 of each file that can be read."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}


def hash_of(files: Mapping[str, str]) -> str:
    """One hash of several files, of their paths and contents."""
    lines = "".join(f"{digest}  {path}\n" for path, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def line_of(file: Path, name: str = "") -> int:
    """The line on which a file defines a name, or else what makes it a subject; 1 if nowhere."""
    wanted = (name,) if name else _NAMES
    try:
        body = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError, OSError):
        return 1
    lines = {each: node.lineno for node in reversed(body) for each in _defined(node)}
    return next((lines[each] for each in wanted if each in lines), 1)


def portable(reference: str, folder: Path) -> str:
    """A reference whose file is named from a folder, so that it means the same from anywhere."""
    place, colon, name = reference.partition(":")
    path = Path(place).expanduser()
    if not (place.endswith(".py") or path.is_file()):
        return reference
    return f"{_relative(path.resolve(), folder.resolve())}{colon}{name}"


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # another drive
        return path.as_posix()


def _file_of(place: str) -> Path | None:
    path = Path(place).expanduser()
    if path.is_file():
        return path.resolve()
    file = getattr(sys.modules.get(place), "__file__", None)
    return None if file is None else Path(file).resolve()


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]
