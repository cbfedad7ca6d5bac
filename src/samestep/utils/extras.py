"""Optional packages: asked for before work starts, with a command that installs them."""

import shlex
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from samestep.errors import ConfigError

REPORT_PACKAGES = ("altair", "jinja2", "markupsafe", "vl_convert")
"""What pages and figures are drawn with: the extra ``report``."""


def require_extra(extra: str, packages: Iterable[str], *, what: str) -> None:
    """Refuse work whose optional packages are not installed; call it before the work starts.

    Args:
        extra: The extra of samestep that installs them.
        packages: Names to import.
        what: What needs them: a flag or a command.

    Raises:
        ConfigError: Names all that are missing, and the command that installs them.
    """
    missing = [name for name in map(_missing, packages) if name]
    if missing:
        names = ", ".join(dict.fromkeys(missing))
        raise ConfigError(f"{what} needs {names}: {install_command(extra)}")


def _missing(package: str) -> str:
    """The package, or what it needs itself, if it cannot be imported; else empty."""
    try:
        import_module(package)
    except ImportError as error:
        return error.name or package
    return ""


def install_command(extra: str) -> str:
    """The command that installs an extra: from the clone that runs, or from the index.

    Args:
        extra: Its name.

    Returns:
        A line for a shell.
    """
    root = Path(__file__).resolve().parents[3]
    clone = (root / "pyproject.toml").is_file() and (root / "src" / "samestep").is_dir()
    requirement = f"{root if clone else 'samestep'}[{extra}]"
    return f"pip install {shlex.quote(requirement)}"
