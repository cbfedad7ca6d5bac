"""A report in Markdown, and the table that page and Markdown share."""

import statistics
from typing import Any

from samestep.study.advice import advise
from samestep.study.compare import compare, final_losses, in_short, signed, span
from samestep.study.normalisation import EXPLAINED
from samestep.study.results import ArmResult, Results

HEADERS = (
    "arm",
    "evaluation loss",
    "vs reference",
    "gradient difference",
    "cosine",
    "length",
    "weights apart",
    "tokens/s",
    "peak memory",
)


def table(results: Results, group: str) -> list[list[str]]:
    """One row an arm of a group, under `HEADERS`."""
    compared = {one.arm: one for one in compare(results) if one.group == group}
    rows = []
    for arm in results.groups()[group]:
        found = compared.get(arm.label)
        difference = found.gradient_difference if found else None
        rows.append(
            [
                arm.label,
                _losses(arm),
                "reference" if arm.reference else signed(found.change if found else None),
                _number(difference, ".1e"),
                _number(found.cosine if found else None, ".4f"),
                "-" if not found or not found.ratio else f"x {span(*found.ratio)}",
                _number(_mean([run.distance for run in arm.finished()]), ".1e"),
                _number(_mean([run.tokens_per_second for run in arm.finished()]), ",.0f"),
                _gigabytes([run.peak_bytes for run in arm.runs]),
            ]
        )
    return rows


def explanations(results: Results) -> dict[str, str]:
    """What each normalisation in the study means."""
    used = {arm.normalisation for arm in results.arms}
    return {name: text for name, text in EXPLAINED.items() if name in used}


def settings(results: Results) -> str:
    """How the arms were run, in a sentence."""
    spec = results.spec
    clip = spec["max_grad_norm"]
    seeds = sorted({run.seed for arm in results.arms for run in arm.runs})
    rates = sorted({f"{arm.lr:g}" for arm in results.arms})
    return (
        f"{spec['steps']} steps, {spec['optimizer']}, learning rate {', '.join(rates)} "
        f"({spec['schedule']}), "
        f"{'no clipping' if clip is None else f'gradient norm clipped at {clip:g}'}, "
        f"{spec['dtype']}, {spec['init']} weights, seeds {', '.join(map(str, seeds))}"
    )


def machine(results: Results) -> str:
    """Where and with what, in a sentence."""
    what = [f"{name} {value}" for name, value in results.machine.items()]
    what += [f"{name} {value}" for name, value in results.versions.items()]
    return ", ".join(what)


def markdown(results: Results, pictures: dict[str, str]) -> str:
    """The report for a pull request.

    Args:
        results: The results.
        pictures: Title by file name of each figure to show.

    Returns:
        Markdown; names are escaped.
    """
    lines = [f"# {_escaped(results.name)}", "", settings(results) + ".", ""]
    lines += [f"- {name}: {text}" for name, text in explanations(results).items()]
    lines += [f"- **Note:** {_escaped(note)}" for note in results.notes]
    lines += ["", "In short:", ""]
    lines += [f"- {_escaped(sentence)}" for sentence in in_short(results)]
    compared = compare(results)
    for group in results.groups():
        lines += ["", f"## {_escaped(group)}", ""]
        lines += [_line(HEADERS), _line(["---"] * len(HEADERS))]
        lines += [_line(map(_escaped, row)) for row in table(results, group)]
        lines += [""]
        lines += [
            f"- **{_escaped(one.arm)}**: {_escaped(one.verdict)}"
            for one in compared
            if one.group == group
        ]
        lines += [
            f"- **Batch**: {one.words} ({one.steps} step estimates.)"
            for one in advise(results)
            if one.group == group
        ]
    lines += ["", "## Rows", "", _line(LENGTH_HEADERS), _line(["---"] * len(LENGTH_HEADERS))]
    lines += [_line(row) for row in lengths(results)]
    for file, title in pictures.items():
        lines += ["", f"![{_escaped(title)}]({file})"]
    lines += ["", f"Measured on: {machine(results)}.", ""]
    return "\n".join(lines)


LENGTH_HEADERS = ("completions cut", "rows", "targets a row: p10", "p50", "p90", "spread")


def lengths(results: Results) -> list[list[str]]:
    """How unequal the rows are, under `LENGTH_HEADERS`."""
    return [
        [
            f"{one.cut:.0%}",
            f"{one.rows:,}",
            f"{one.p10:.0f}",
            f"{one.p50:.0f}",
            f"{one.p90:.0f}",
            f"{one.spread:.2f}",
        ]
        for one in results.lengths
    ]


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


_MARKS = str.maketrans(
    {mark: f"\\{mark}" for mark in "\\`*_[]|#"} | {"<": "&lt;", ">": "&gt;", "\n": " "}
)


def _escaped(text: str) -> str:
    return text.translate(_MARKS)


def _losses(arm: ArmResult) -> str:
    values = list(final_losses(arm).values())
    if not values:
        return "diverged"
    mean = f"{statistics.fmean(values):.4f}"
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    lost = len(arm.runs) - len(values)
    return mean + spread + (f" ({lost} diverged, left out)" if lost else "")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _gigabytes(values: list[int | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known) / 2**30:.2f} GiB" if known else "-"
