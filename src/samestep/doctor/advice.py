"""What to do about what was found: upgrade, one line that makes the step exact, or nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from samestep.doctor.known import KINDS, STEP, upgrade

_KINDS = {
    "causal_lm": "causal_lm",
    "masked_lm": "masked_lm",
    "classification": "classification",
    "sft": "sft_completions",
}
"""Probes, by what was measured of releases."""


def advise(probes: Sequence[Mapping[str, Any]], versions: Mapping[str, str | None]) -> list[str]:
    """What to do, a line each.

    Args:
        probes: What `samestep.doctor.probes.run_probe` returned.
        versions: What is installed.

    Returns:
        The lines; "nothing" if there is nothing to be done.
    """
    inexact = [probe for probe in probes if probe["verdict"] == "inexact"]
    lines = _of_cures(inexact)
    broken = [
        _KINDS[probe["probe"]]
        for probe in inexact
        if probe["probe"] in _KINDS and STEP & _inexact_axes(probe)
    ]
    installed = versions.get("transformers")
    if broken and installed is not None:
        names = ", ".join(KINDS[kind] for kind in broken)
        newer = upgrade(installed, broken)
        lines.append(
            f"no release newer than {installed} that was measured has an exact step for {names}"
            if newer is None
            else f"or upgrade to transformers {newer}: there the step of {names} is exact (what "
            "it logs and evaluates may still not be)"
        )
    lines += [f"{probe['title']} could not be run: {_first_line(probe['why'])}"
              for probe in probes if probe["verdict"] == "not run"]  # fmt: skip
    if not probes:
        lines.append(
            "nothing was found to check: no transformers, accelerate or Lightning is installed "
            "here. Of a loop of your own: samestep check --init"
        )
    return lines or ["nothing: what is installed here is exact"]


def _of_cures(inexact: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each cure that works, with what it cures, and one for each that does not."""
    working: dict[str, list[str]] = {}
    failing = []
    for probe in inexact:
        cure = probe["cure"]
        if cure["verdict"] == "exact":
            working.setdefault(cure["name"], []).append(probe["title"])
        elif cure["verdict"] == "inexact":
            left = ", ".join(sorted(_inexact_axes(cure)))
            failing.append(f"{probe['title']}: {cure['name']} leaves {left} inexact")
        else:
            failing.append(f"{probe['title']}: no {cure['name']}: {_first_line(cure['why'])}")
    return [f"{name} makes exact, as tried here: {'; '.join(titles)}"
            for name, titles in working.items()] + failing  # fmt: skip


def _inexact_axes(found: Mapping[str, Any]) -> set[str]:
    return {axis["name"] for axis in found["axes"] if axis["verdict"] == "inexact"}


def _first_line(text: str) -> str:
    lines = [line.strip(" -") for line in text.strip().splitlines()]
    return " ".join(lines[:2]) if lines and lines[0].endswith(":") else (lines or [""])[0]
