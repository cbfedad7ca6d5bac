"""Certificates: what was checked of which code, in which versions, and with what verdict."""

import json
from collections.abc import Mapping
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from samestep.audit.source import hash_files, hash_of, portable
from samestep.errors import ConfigError
from samestep.utils.text import printable
from samestep.utils.version import package_version

FORMAT = "samestep certificate 1"
COLOURS = {"exact": "#15803d", "inexact": "#b91c1c"}
_LABEL = "same step"
_FIELDS = ("subject", "verdict", "axes", "versions", "source")


def certificate(report: Mapping[str, Any], reference: str, folder: Path) -> dict[str, Any]:
    """What a report says, with the hash of the code that it says it of.

    Args:
        report: From `samestep.audit.command.audit_in_child`.
        reference: The subject as it was named.
        folder: That the certificate is to stand in: the subject is named from there.

    Returns:
        For JSON.
    """
    axes = [
        {name: axis[name] for name in ("name", "verdict", "relative_difference", "noise_floor",
                                       "cause", "reason")}
        for axis in report["axes"]
    ]  # fmt: skip
    files = report["source"]["files"]
    return {
        "format": FORMAT,
        "subject": portable(reference, folder),
        "name": report["subject"],
        "verdict": report["verdict"],
        "axes": axes,
        "examples": report["examples"],
        "dtype": report["dtype"],
        "seed": report["seed"],
        "versions": {**report["versions"], "samestep": package_version()},
        "source": {"sha256": hash_of(files), "files": files},
    }


def badge(found: Mapping[str, Any]) -> str:
    """A picture of a certificate's verdict, as SVG.

    Args:
        found: A `certificate`.
    """
    run = [axis for axis in found["axes"] if axis["verdict"] != "skipped"]
    inexact = sum(axis["verdict"] == "inexact" for axis in run)
    said = f"exact on {len(run)} axes" if not inexact else f"inexact on {inexact} of {len(run)}"
    left, right = 6 * len(_LABEL) + 14, 6 * len(said) + 14
    title = escape(printable(f"{_LABEL}: {said} ({found['name']}, samestep {package_version()})"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" '
        f'aria-label="{title}"><title>{title}</title>'
        f'<clipPath id="r"><rect width="{left + right}" height="20" rx="3"/></clipPath>'
        f'<g clip-path="url(#r)"><rect width="{left}" height="20" fill="#374151"/>'
        f'<rect x="{left}" width="{right}" height="20" fill="{COLOURS[found["verdict"]]}"/></g>'
        f'<g fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" '
        f'font-size="11"><text x="{left / 2:g}" y="14" textLength="{left - 12}">{_LABEL}</text>'
        f'<text x="{left + right / 2:g}" y="14" textLength="{right - 12}">{said}</text></g></svg>\n'
    )


def read_certificate(path: Path) -> dict[str, Any]:
    """A certificate from a file.

    Raises:
        ConfigError: There is none, or it is no certificate.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--verify {path}: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(f'--verify {path}: it does not say "format": "{FORMAT}"')
    missing = [name for name in _FIELDS if name not in content]
    if missing or not isinstance(content["source"], dict) or "files" not in content["source"]:
        raise ConfigError(f"--verify {path}: it lacks {', '.join(missing) or 'source.files'}")
    return content


def changes_since(found: Mapping[str, Any], folder: Path) -> list[str]:
    """What is other than when a certificate was made, a line each: code, and versions.

    Args:
        found: A `certificate`.
        folder: That it stands in.
    """
    place = found["subject"].partition(":")[0]
    base = (folder / place).resolve().parent
    files: Mapping[str, str] = found["source"]["files"]
    lines = []
    if hash_of(files) != found["source"].get("sha256"):
        lines.append("the certificate itself: its hash is not that of its files")
    paths = {name: (base / name).resolve() for name in files}
    hashes = hash_files(paths.values())
    for name, digest in files.items():
        now = hashes.get(paths[name])
        if now != digest:
            lines.append(f"{name}: {'it is gone' if now is None else 'it has changed'}")
    if not files:
        lines.append(f"{found['subject']}: the certificate names no file of it")
    for name, number in found["versions"].items():
        current = _version(name)
        if current != number:
            lines.append(f"{name} {number}: now {current or 'not installed'}")
    return lines


def _version(name: str) -> str | None:
    if name == "python":
        return python_version()
    if name == "samestep":
        return package_version()
    try:
        return version(name)
    except PackageNotFoundError:
        return None
