"""What is known of releases, for `samestep doctor`: made from the results of audits and history.

    python tools/known_faults.py            writes src/samestep/doctor/known.json

Only the verdicts are kept, and how large a step is: what the doctor says of the versions it finds.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from samestep.utils.files import write_atomically

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KNOWN = ROOT / "src" / "samestep" / "doctor" / "known.json"

AUDITED = {
    "llama": "causal_lm",
    "bert_masked": "masked_lm",
    "bert_classes": "classification",
    "qwen3_vl": "vision_language",
    "trl_sft": "sft_completions",
    "trl_dpo": "dpo",
    "trl_reward": "reward",
}
"""The subjects of the audit, by what the history calls the same."""

AXES = ("micro-batch", "short-window", "reported", "evaluation-batch")
PACKAGES = ("transformers", "trl")
PLAIN = "as it is"


def known() -> dict[str, Any]:
    """The content of the file."""
    releases: dict[str, dict[str, Any]] = {}
    for found in (_of_audit(), *_of_history()):
        versions = {name: found["versions"][name] for name in PACKAGES if name in found["versions"]}
        # What the history says of a release of its own replaces the audit's.
        entry = releases.setdefault(versions["transformers"], {"versions": {}, "kinds": {}})
        entry["versions"] |= versions
        entry["kinds"] |= found["kinds"]
    ordered = sorted(releases.values(), key=lambda entry: _numbers(entry["versions"]))
    heads = json.loads((RESULTS / "audit-heads.json").read_text(encoding="utf-8"))
    classes = {
        name: [one["cause"], float(f"{one['ratio']:.4g}")]
        for name, one in sorted(heads["classes"].items())
        if one["verdict"] != "not run"
    }
    return {
        "releases": ordered,
        "classes": {"transformers": heads["versions"]["transformers"], "heads": classes},
    }


def text() -> str:
    """The file: an entry on a line."""
    found = known()
    releases = ",\n  ".join(json.dumps(one) for one in found["releases"])
    heads = found["classes"]["heads"].items()
    classes = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(one)}" for name, one in heads)
    release = json.dumps(found["classes"]["transformers"])
    return (
        f'{{"releases": [\n  {releases}\n],\n'
        f'"classes": {{"transformers": {release}, "heads": {{\n  {classes}\n}}}}}}\n'
    )


def _of_audit() -> dict[str, Any]:
    content = json.loads((RESULTS / "audit-subjects.json").read_text(encoding="utf-8"))
    kinds = {}
    for subject, kind in AUDITED.items():
        one = content["subjects"].get(subject, {"verdict": "not run"})
        if one["verdict"] != "not run":
            axes = {axis["name"]: axis for axis in one["axes"]}
            kinds[kind] = _kind(axes, axes["micro-batch"]["ratio"])
    return {"versions": content["versions"], "kinds": kinds}


def _of_history() -> Iterator[dict[str, Any]]:
    """Each release that has been measured; there may be none yet."""
    for path in sorted(RESULTS.glob("history*.json")) + sorted(RESULTS.glob("history/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        several = content.get("releases", content)
        for release in [content] if "subjects" in content else several.values():
            kinds = {
                kind: _kind(ways[PLAIN]["axes"], ways[PLAIN]["ratio"])
                for kind, ways in release["subjects"].items()
                if ways.get(PLAIN, {}).get("verdict", "not run") != "not run"
            }
            yield {"versions": release["versions"], "kinds": kinds}


def _kind(axes: dict[str, Any], ratio: float) -> dict[str, Any]:
    """The axes on which a kind is inexact, and how long its gradient is at 8 x 1 over 1 x 8."""
    inexact = [name for name in AXES if axes.get(name, {}).get("verdict") == "inexact"]
    unknown = [name for name in AXES if axes.get(name, {}).get("verdict", "skipped") == "skipped"]
    found = {"inexact": inexact, "scale": float(f"{ratio:.4g}")}
    return found | ({"unknown": unknown} if unknown else {})


def _numbers(versions: dict[str, str]) -> list[int]:
    parts = versions["transformers"].split(".")
    return [int("".join(filter(str.isdigit, part)) or 0) for part in parts]


if __name__ == "__main__":
    write_atomically(KNOWN, text())
