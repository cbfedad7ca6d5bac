"""docs/history.md and its picture from the results: no figure in them is typed in.

python benchmarks/history/page.py
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samestep.utils.files import write_atomically

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "history"
PAGE = ROOT / "docs" / "history.md"
PICTURE = ROOT / "docs" / "history.svg"

PLAIN, EXACT = "as it is", "with exact"
NAMES = {
    "causal_lm": "causal LM",
    "masked_lm": "masked LM",
    "classification": "classification, encoder",
    "decoder_classification": "classification, decoder",
    "token_classification": "token classification",
    "seq2seq": "seq2seq",
    "vision_language": "vision-language",
    "sft_completions": "SFT, completions",
    "sft_packed": "SFT, packed",
    "dpo": "DPO",
    "reward": "reward model",
}
"""What is audited, by the name of its subject, and what it is called on the page."""

MODELS = {
    "causal_lm": "Llama",
    "masked_lm": "Bert",
    "classification": "Bert",
    "decoder_classification": "Llama",
    "token_classification": "Bert",
    "seq2seq": "T5, Seq2SeqTrainer",
    "vision_language": "Llava",
    "sft_completions": "Llama, SFTTrainer",
    "sft_packed": "Llama, SFTTrainer",
    "dpo": "Llama, DPOTrainer",
    "reward": "Llama, RewardTrainer",
}

SAMPLER = "as the sampler deals"
"""What the axis of ranks tries last: rows that a sampler repeats, so that ranks have as many."""

NO_UPDATE = "without an update"

INTRODUCTION = """\
# When it was broken, mended, and broken again

Written by `make history` from `benchmarks/results/history`: each release of transformers with the
accelerate and the TRL of its time, in an environment of its own, under the same PyTorch and the
same auditor. Models are random and tiny, rows are ragged, gradients are float64. "Use the newest
release" is not the answer: what is exact is a matter of the release, the head and the trainer. Look
here, or run `samestep check` where you train. An empty field has not been measured.

![One row a trainer, one column a release: exact, or how far the gradient is off](history.svg)
"""

SECTIONS = (
    (
        "The cut into micro-batches",
        "micro-batch",
        "The gradient of 1 x 8 (eight micro-batches of one row) against that of 8 x 1: `x` its "
        "length over the length of the other. `exact` is up to the noise that the auditor "
        "measures. Where the length is right and the step is not, its direction is off; the "
        "largest difference of any cut is in brackets.",
    ),
    (
        "A window that is not full",
        "short-window",
        "The last window of an epoch has fewer micro-batches than the others, or a smaller last "
        "one: the difference of its gradient from that of its rows in one micro-batch. `no step`: "
        "the trainer ends without an update.",
    ),
    (
        "Evaluation",
        "evaluation-batch",
        "The largest relative difference of a number that an evaluation reports, between batches "
        "of 1, 2 and 3 rows and one of all.",
    ),
    (
        "Ranks",
        "ranks",
        "Two processes against one, same rows: the difference of the gradient. `exact *`: but a "
        "row that the sampler repeats, so that all ranks have as many, counts twice.",
    ),
)

WITH_EXACT = """
## With `samestep.hf.exact`

The same trainers after `exact(trainer)`, by the cut into micro-batches and by the window that is
not full: the worse of the two. `no step`: a loop that ends without an update stays as it is.
`refused`: it says why, and which release to take.

"""


def load() -> dict[str, Any]:
    """The results, by release, oldest first."""
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in RESULTS.glob("*.json")}
    return dict(sorted(found.items(), key=lambda item: [int(part) for part in item[0].split(".")]))


def write_page() -> None:
    """Write the page and the picture; nothing without results."""
    results = load()
    write_atomically(PAGE, page(results))
    write_atomically(PICTURE, picture(results))


def page(results: Mapping[str, Any]) -> str:
    """The page in Markdown."""
    parts = [INTRODUCTION, "\n", versions(results)]
    for title, axis, text in SECTIONS:
        parts.append(f"\n## {title}\n\n{text}\n\n")
        parts.append(table(results, lambda one, axis=axis: cell(one, axis)))
    parts += [WITH_EXACT, table(results, exact_cell, way=EXACT), not_run(results)]
    return "".join(parts)


def versions(results: Mapping[str, Any]) -> str:
    """Which packages stood together."""
    lines = ["| transformers | accelerate | TRL | torch |", "| --- | --- | --- | --- |"]
    for one in results.values():
        held = one["versions"]
        lines.append(
            f"| {held['transformers']} | {held['accelerate']} | {held['trl']} | {held['torch']} |"
        )
    return "\n".join(lines) + "\n"


def table(results: Mapping[str, Any], fill: Any, *, way: str = PLAIN) -> str:
    """A row for each subject, a column for each release; rows without any value are left out."""
    lines = [
        f"| trainer, model | {' | '.join(results)} |",
        f"| --- | {' | '.join('---' for _ in results)} |",
    ]
    for kind, name in NAMES.items():
        found = [one["subjects"].get(kind, {}).get(way) for one in results.values()]
        cells = ["" if one is None else fill(one) for one in found]
        if any(cells):
            lines.append(f"| {name} ({MODELS[kind]}) | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(found: Mapping[str, Any], axis: str) -> str:
    """What one release did along one axis."""
    if found["verdict"] == "not run":
        return "not run"
    seen = found["axes"].get(axis)
    if seen is None:
        return ""
    if seen["verdict"] == "skipped":
        return "**no step**" if NO_UPDATE in seen["reason"] else "skipped"
    if seen["verdict"] == "exact":
        return "exact"
    if axis == "ranks" and SAMPLER in seen["reason"]:
        return "exact *"
    if axis == "micro-batch":
        return f"**x {found['ratio']:.3f}** ({seen['difference']:.1e})"
    return f"**{seen['difference']:.1e}**"


def exact_cell(found: Mapping[str, Any]) -> str:
    """The step of a trainer that was made exact."""
    if found["verdict"] == "not run":
        return "refused" if is_refusal(found) else "not run"
    seen = [found["axes"][name] for name in ("micro-batch", "short-window")]
    wrong = [one for one in seen if one["verdict"] == "inexact"]
    if wrong:
        return f"**{max(one['difference'] for one in wrong):.1e}**"
    reasons = [one["reason"] for one in seen if one["verdict"] == "skipped"]
    return "exact, no step" if any(NO_UPDATE in reason for reason in reasons) else "exact"


def is_refusal(found: Mapping[str, Any]) -> bool:
    """Whether `exact` said that it could not be."""
    return "ConfigError" in found["why"] or "exact() needs" in found["why"]


def not_run(results: Mapping[str, Any]) -> str:
    """Why there is no number, for each that has none."""
    reasons: dict[str, list[str]] = {}
    for release, one in results.items():
        for kind, ways in one["subjects"].items():
            for way, found in ways.items():
                if found["verdict"] == "not run":
                    place = f"{release} {NAMES[kind]}{' with exact' if way == EXACT else ''}"
                    place = f"{release} with exact" if is_refusal(found) else place
                    places = reasons.setdefault(found["why"].partition(" (")[0], [])
                    places += [] if place in places else [place]
    if not reasons:
        return ""
    lines = [f"- {', '.join(places)}: {why}" for why, places in reasons.items()]
    return "\n## Not run\n\n" + "\n".join(lines) + "\n"


def picture(results: Mapping[str, Any]) -> str:
    """The table of the cut as SVG: a field for each trainer and release."""
    import altair
    import vl_convert

    fields = [
        {
            "release": release,
            "trainer": NAMES[kind],
            "step": kind_of(one["subjects"][kind][PLAIN]),
            "text": short(one["subjects"][kind][PLAIN]),
        }
        for release, one in results.items()
        for kind in NAMES
        if PLAIN in one["subjects"].get(kind, {})
    ]
    base = altair.Chart(altair.Data(values=fields)).encode(
        x=altair.X("release:N", sort=list(results), title="transformers", axis={"labelAngle": 0}),
        y=altair.Y("trainer:N", sort=list(NAMES.values()), title=None),
    )
    colours = altair.Color(
        "step:N",
        title="1 x 8 against 8 x 1",
        scale=altair.Scale(domain=list(COLOURS), range=list(COLOURS.values())),
    )
    squares = base.mark_rect(stroke="#ffffff", strokeWidth=2).encode(color=colours)
    texts = base.mark_text(fontSize=11, color="#111827").encode(text="text:N")
    chart = (squares + texts).properties(width=520, height=300, background="#ffffff")
    return str(vl_convert.vegalite_to_svg(chart.to_json()))


COLOURS = {
    "exact": "#86efac",
    "off by less than half": "#fde68a",
    "off by half or more": "#fca5a5",
    "not run": "#e5e7eb",
}


def kind_of(found: Mapping[str, Any]) -> str:
    """The colour of a field."""
    if found["verdict"] == "not run":
        return "not run"
    if found["verdict"] == "exact":
        return "exact"
    worst = found["axes"]["micro-batch"]["difference"]
    return "off by half or more" if worst >= 0.5 else "off by less than half"


def short(found: Mapping[str, Any]) -> str:
    """The text of a field."""
    if found["verdict"] in ("exact", "not run"):
        return str(found["verdict"])
    return f"x {found['ratio']:.2f}"


if __name__ == "__main__":
    write_page()
