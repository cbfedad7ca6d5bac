"""docs/audit.md from the results: no figure in it is typed in.

python benchmarks/audit/tables.py
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from samestep.utils.files import write_atomically

ROOT = Path(__file__).parents[2]
SUBJECTS = ROOT / "benchmarks" / "results" / "audit-subjects.json"
HEADS = ROOT / "benchmarks" / "results" / "audit-heads.json"
PAGE = ROOT / "docs" / "audit.md"

INTRODUCTION = """\
# What the auditor found

Written by `make audit` from `benchmarks/results/audit-subjects.json` and `audit-heads.json`; the
models are random and tiny, and how a loss normalises does not depend on their size. `scale` and
`cosine` compare the gradient of 8 ragged examples at accumulation 4 with that of the undivided
batch, in float64. How `samestep check` tells them is in [check.md](check.md).
"""

TRAINERS = """
## Trainers

{versions}, the trainers' own settings but for the loss that is named. `step`: the verdict on the
micro-batch size; `reported`: on what is logged; `evaluation`: on the evaluation batch size, with
the number that changes most. Then further axes of [check.md](check.md); of those that are newer
than these results it says "not run". `with exact`: the axes that were inexact, after
[`samestep.hf.exact`](trainers.md); empty where it was not tried.

"""

OTHER_AXES = ("short-window", "ranks", "evaluation-ranks", "next-step", "loader")
"""Axes that have a column with the verdict and the cause."""

SWEEP = """
## Every trainable head of transformers

{versions}, `transformers.Trainer` with its defaults, each class at about a thousandth of its size:
{counts}. Rows are text alone unless a class insists on a picture.

"""

NOT_RUN = """
## Heads that were not run

Classes that could not be built small, or that need inputs which the sweep does not make: {number}.

"""


def write_docs() -> None:
    """Write the page."""
    write_atomically(PAGE, page(json.loads(SUBJECTS.read_text()), json.loads(HEADS.read_text())))


def page(subjects: dict[str, Any], heads: dict[str, Any]) -> str:
    """The page in Markdown."""
    classes = heads["classes"]
    ran = {name: one for name, one in classes.items() if one["verdict"] != "not run"}
    failed = {name: one for name, one in classes.items() if one["verdict"] == "not run"}
    verdicts = Counter(one["verdict"] for one in ran.values())
    counts = ", ".join(f"{number} {verdict}" for verdict, number in sorted(verdicts.items()))
    parts = [
        INTRODUCTION,
        TRAINERS.format(versions=_versions(subjects)),
        _table(
            (
                "subject",
                "trainer, model",
                "step",
                "scale",
                "cosine",
                "cause",
                "reported",
                "evaluation",
                *OTHER_AXES,
                "with exact",
            ),
            [_subject(name, one) for name, one in subjects["subjects"].items()],
        ),
        SWEEP.format(versions=_versions(heads), counts=f"{len(ran)} ran, {counts}"),
        _table(("task", "exact", "inexact", "not run"), _totals(classes)),
        "\n",
        _table(("cause", "inexact", *(words for words, _ in CURES)), _cures(classes)),
        "\n",
        _table(
            ("class", "task", "verdict", "scale", "cosine", "cause", "with exact", "inputs"),
            [_head(name, one) for name, one in sorted(ran.items(), key=_rank)],
        ),
        NOT_RUN.format(number=len(failed)),
        _table(
            ("class", "task", "why"),
            [(name, one["task"], _cell(one["why"])) for name, one in sorted(failed.items())],
        ),
    ]
    return "".join(parts)


def _versions(results: dict[str, Any]) -> str:
    packages = results["versions"].items()
    return ", ".join(f"{name} {version}" for name, version in packages if name != "samestep")


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _subject(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    if found["verdict"] == "not run":
        unknown = ("",) * (3 + len(OTHER_AXES))
        return (name, "", "not run", "", "", _cell(found["why"]), *unknown)
    axes = {axis["name"]: axis for axis in found["axes"]}
    four, step = found["accumulation 4"], axes["micro-batch"]
    kinds = found["subject"].partition("(")[2].rstrip(")")
    scale, cosine = _figures(four, step["verdict"])
    return (
        f"`{name}`",
        kinds,
        step["verdict"],
        scale,
        cosine,
        step["cause"] or "",
        _scalar(axes["reported"]),
        _scalar(axes["evaluation-batch"]),
        *(_in_words(axes.get(axis)) for axis in OTHER_AXES),
        _cured(found),
    )


def _in_words(axis: dict[str, Any] | None) -> str:
    """A verdict, with the cause; of results that are older than an axis, that it was not run."""
    if axis is None:
        return "not run"
    return f"inexact: {axis['cause']}" if axis["verdict"] == "inexact" else str(axis["verdict"])


def _scalar(axis: dict[str, Any]) -> str:
    """A verdict on numbers, and the number that moves."""
    if axis["verdict"] != "inexact":
        return str(axis["verdict"])
    return f"inexact: `{axis['evidence'].partition(':')[0]}`"


def _figures(seen: dict[str, Any], verdict: str) -> tuple[str, str]:
    if verdict == "exact":
        return "1", "1"
    return f"{seen['ratio']:.4g}", f"{seen['cosine']:.4f}"


def _totals(classes: dict[str, Any]) -> list[tuple[str, ...]]:
    tasks = list(dict.fromkeys(one["task"] for one in classes.values()))
    rows = []
    for task in tasks:
        found = Counter(one["verdict"] for one in classes.values() if one["task"] == task)
        rows.append((task, *(str(found[verdict]) for verdict in ("exact", "inexact", "not run"))))
    return rows


CURES: tuple[tuple[str, Callable[[dict[str, Any]], bool]], ...] = (
    ("exact after `exact`", lambda cured: cured["verdict"] == "exact"),
    ("refused by it", lambda cured: cured["verdict"] == "refused"),
    ("refused by `prove=True`", lambda cured: bool(cured.get("prove"))),
    (
        "still inexact",
        lambda cured: cured["verdict"] in ("inexact", "not run") and not cured.get("prove"),
    ),
)
"""What becomes of an inexact head, and whether it is so, by what is held of it."""


def _cures(classes: dict[str, Any]) -> list[tuple[str, ...]]:
    """By cause, what becomes of the heads that were inexact."""
    found: dict[str, list[dict[str, Any]]] = {}
    for one in classes.values():
        if one["verdict"] == "inexact" and "with exact" in one:
            found.setdefault(one["cause"], []).append(one["with exact"])
    return [
        (cause, str(len(cured)), *(str(sum(map(is_so, cured))) for _, is_so in CURES))
        for cause, cured in sorted(found.items(), key=lambda item: -len(item[1]))
    ]


def _rank(item: tuple[str, dict[str, Any]]) -> tuple[Any, ...]:
    """The largest differences first."""
    name, found = item
    return (found["verdict"] == "exact", -float(found["difference"]), name)


def _head(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    scale, cosine = _figures(found, found["verdict"])
    return (
        name, found["task"], found["verdict"], scale, cosine, found["cause"] or "", _cured(found),
        found["inputs"],
    )  # fmt: skip


def _cured(found: dict[str, Any]) -> str:
    """What `samestep.hf.exact` makes of it: empty where it was exact, or where it was not tried."""
    cured = found.get("with exact")
    if cured is None:
        return ""
    left = f": {', '.join(cured['left'])}" if cured.get("left") else ""
    given = cured.get("options", {}).items()
    options = "".join(f", with `{name}={value}`" for name, value in given)
    proof = ", refused with `prove=True`" if cured.get("prove") else ""
    refused = f"; refused: {', '.join(cured['refused'])}" if cured.get("refused") else ""
    return f"{cured['verdict']}{left}{options}{proof}{refused}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    write_docs()
