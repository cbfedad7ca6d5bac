"""Optional packages: asked for before work starts, with a command that installs them."""

import json
import shlex
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.requirements import Requirement

from samestep.errors import ConfigError

REPORT_PACKAGES = ("altair", "jinja2", "markupsafe", "vl_convert")
"""What pages and figures are drawn with: the extra ``report``."""

_NAME = "samestep"


class MissingExtraError(ConfigError, ImportError):
    """What an import or a command needs is not installed; the message has the command that does."""


def require_extra(extra: str, packages: Iterable[str], *, what: str) -> None:
    """Refuse work whose optional packages are not installed; call it before the work starts.

    Args:
        extra: The extra of samestep that installs them.
        packages: Names to import.
        what: What needs them: a flag or a command.

    Raises:
        MissingExtraError: Names all that are missing, and the command that installs them.
    """
    missing = [name for name in map(_missing, packages) if name]
    if missing:
        raise MissingExtraError(missing_text(extra, dict.fromkeys(missing), what=what))


def require_available(extra: str, packages: Iterable[str], *, what: str) -> None:
    """As `require_extra`, without importing the packages: they may take seconds.

    Args:
        extra: The extra of samestep that installs them.
        packages: Names to import.
        what: What needs them: a flag or a command.

    Raises:
        MissingExtraError: Names all that are missing, and the command that installs them.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MissingExtraError(missing_text(extra, missing, what=what))


def require_installed(*extras: str, what: str) -> None:
    """Refuse what needs extras whose requirements are not met; nothing of them is imported.

    Args:
        *extras: What each requires, and in which versions, is read from the package itself.
        what: What needs them: a command or a module.

    Raises:
        MissingExtraError: Names all that are missing or of another version, and the command that
            installs them.
    """
    unmet = {extra: list(filter(None, map(_unmet, _requirements(extra)))) for extra in extras}
    lacking = [extra for extra in extras if unmet[extra]]
    if lacking:
        missing = [text for extra in lacking for text in unmet[extra]]
        raise MissingExtraError(missing_text(",".join(lacking), missing, what=what))


def missing_text(extra: str, names: Iterable[str], *, what: str) -> str:
    """The line that says what is missing, and how to get it.

    Args:
        extra: The extra, or several with commas between.
        names: Of packages.
        what: What needs them.
    """
    return f"{what} needs {', '.join(names)}: {install_command(extra)}"


def _missing(package: str) -> str:
    """The package, or what it needs itself, if it cannot be imported; else empty."""
    try:
        import_module(package)
    except ImportError as error:
        return error.name or package
    return ""


def _own() -> Distribution | None:
    """This package as it is installed; None where it merely stands on the path."""
    try:
        return distribution(_NAME)
    except PackageNotFoundError:
        return None


def _requirements(extra: str) -> Iterator[Requirement]:
    """What an extra requires, those of other extras that it names among them."""
    own = _own()
    for line in (own.requires if own is not None else None) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if (
            marker is None
            or marker.evaluate({"extra": ""})
            or not marker.evaluate({"extra": extra})
        ):
            continue
        if requirement.name != _NAME:
            yield requirement
        for other in sorted(requirement.extras if requirement.name == _NAME else ()):
            yield from _requirements(other)


def _unmet(requirement: Requirement) -> str:
    """A requirement, with what is there instead; empty where it is met."""
    wanted = f"{requirement.name}{requirement.specifier}"
    try:
        found = distribution(requirement.name).version
    except PackageNotFoundError:
        return wanted
    met = requirement.specifier.contains(found, prereleases=True)
    return "" if met else f"{wanted} (here is {found})"


def install_command(extra: str) -> str:
    """The command that installs an extra: from where this package came, or from the index.

    Args:
        extra: Its name, or several with commas between.

    Returns:
        A line for a shell.
    """
    source, editable = _source()
    if source is None:
        return f"pip install {shlex.quote(f'{_NAME}[{extra}]')}"
    here = "." if source == Path.cwd() else source
    return f"pip install {'-e ' if editable else ''}{shlex.quote(f'{here}[{extra}]')}"


def _source() -> tuple[Path | None, bool]:
    """The clone or the archive that this package came from, and whether it runs in that clone."""
    root = Path(__file__).resolve().parents[3]
    if (root / "pyproject.toml").is_file() and (root / "src" / _NAME).is_dir():
        own = _own()
        return root, own is not None and _origin(own) == root
    own = _own()
    path = None if own is None else _origin(own)
    return (path if path is not None and path.exists() else None), False


def _origin(own: Distribution) -> Path | None:
    """The folder or the file that pip was given, as it wrote it down."""
    text = own.read_text("direct_url.json")
    url = urlsplit(json.loads(text)["url"]) if text else None
    return Path(unquote(url.path)) if url is not None and url.scheme == "file" else None
