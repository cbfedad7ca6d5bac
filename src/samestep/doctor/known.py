"""What is known of releases: measured before, shipped with the package, made by a tool."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samestep.doctor.environment import release

FILE = Path(__file__).with_name("known.json")

KINDS = {
    "causal_lm": "causal LM",
    "masked_lm": "masked LM",
    "classification": "classification",
    "token_classification": "token classification",
    "seq2seq": "seq2seq",
    "vision_language": "vision-language",
    "sft_completions": "TRL SFT",
    "dpo": "TRL DPO",
    "reward": "TRL reward model",
}
"""What was measured of each release, and what it is called."""

STEP = {"micro-batch", "short-window"}
"""The axes on which the step itself depends on the cut."""

_LIMITS = {"short-window": "last window", "reported": "logs", "evaluation-batch": "evaluation"}


@functools.cache
def known() -> dict[str, Any]:
    """The content of the file: ``releases``, in order, and ``classes``."""
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def measured(installed: str) -> dict[str, Any] | None:
    """The entry of a release of transformers, or of the nearest one before it."""
    before = [
        entry
        for entry in known()["releases"]
        if release(entry["versions"]["transformers"]) <= release(installed)
    ]
    return before[-1] if before else None


def lines_on(installed: str) -> list[str]:
    """What is known of a release of transformers, a line each."""
    entry = measured(installed)
    if entry is None:
        oldest = known()["releases"][0]["versions"]["transformers"]
        return [f"nothing: {oldest} is the oldest release that was measured"]
    names = ", ".join(f"{name} {number}" for name, number in entry["versions"].items())
    same = release(entry["versions"]["transformers"]) == release(installed)
    lines = [f"measured with {names}{'' if same else ', the nearest release before yours'}:"]
    return lines + [
        f"  {KINDS[kind]}: {_verdict(found)}"
        for kind, found in entry["kinds"].items()
        if kind in KINDS
    ]


def line_on_class(name: str) -> str | None:
    """What is known of a class of transformers; None if it was not measured."""
    classes = known()["classes"]
    if name not in classes["heads"]:
        return None
    cause, scale = classes["heads"][name]
    found = "its step was exact" if cause is None else f"x {scale:g} at accumulation 4, {cause}"
    return f"{name} in transformers {classes['transformers']}: {found}"


def upgrade(installed: str, kinds: Sequence[str]) -> str | None:
    """The first newer release that was measured in which the step of these kinds is exact."""
    for entry in known()["releases"]:
        number: str = entry["versions"]["transformers"]
        found: Mapping[str, Any] = entry["kinds"]
        newer = release(number) > release(installed)
        if newer and all(kind in found and _is_exact_step(found[kind]) for kind in kinds):
            return number
    return None


def _is_exact_step(found: Mapping[str, Any]) -> bool:
    """Whether a step was measured on each of its axes, and exact; what was skipped is not."""
    return not STEP & {*found["inexact"], *found.get("unknown", ())}


def _verdict(found: Mapping[str, Any]) -> str:
    inexact = found["inexact"]
    if not inexact:
        return "exact, where it could be measured" if found.get("unknown") else "exact"
    told = [f"step x {found['scale']:g}"] if "micro-batch" in inexact else []
    return ", ".join([*told, *(f"{_LIMITS[axis]} inexact" for axis in inexact if axis in _LIMITS)])
