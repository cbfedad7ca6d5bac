"""What is installed here, without importing any of it."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from samestep.utils.version import package_version

LIBRARIES = ("transformers", "trl", "accelerate", "lightning")
"""Those whose steps are looked at."""


def installed() -> dict[str, str | None]:
    """The version of Python, torch, samestep and of each library; None: it is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "samestep": package_version(),
    }
    for name in ("torch", *LIBRARIES):
        found[name] = _version(name)
    return found


def missing(versions: Mapping[str, str | None]) -> list[str]:
    """The libraries that are not installed."""
    return [name for name in LIBRARIES if versions.get(name) is None]


def release(text: str) -> tuple[int, ...]:
    """The numbers of a version, to compare: those before any letter or sign."""
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
