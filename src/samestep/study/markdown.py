"""A report in Markdown, and the tables and sentences that it shares with the page."""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from samestep.study.comparison import (
    ArmComparison,
    compare_arms,
    final_losses,
    format_change,
    format_range,
    summarise,
)
from samestep.study.normalisation import EXPLANATIONS
from samestep.study.recommendation import recommend
from samestep.study.results import ArmResult, Results
from samestep.study.statistics import batch_size_advice
from samestep.utils.text import printable

ARM_HEADERS = (
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

LENGTH_HEADERS = ("completions cut", "rows", "targets a row: p10", "p50", "p90", "spread")


def render_markdown(results: Results, images: Mapping[str, str]) -> str:
    """The report for a pull request.

    Args:
        results: The results.
        images: Title by file name of each figure to show.

    Returns:
        Markdown; names are escaped.
    """
    lines = [f"# {_escape(results.name)}", "", describe_settings(results) + ".", ""]
    lines += [f"- {name}: {text}" for name, text in explain_normalisations(results).items()]
    lines += [f"- **Note:** {_escape(note)}" for note in results.notes]
    lines += ["", f"**{_escape(recommend(results))}**", "", "In short:", ""]
    lines += [f"- {_escape(sentence)}" for sentence in summarise(results)]
    for group in results.groups():
        lines += _group_section(results, group)
    lines += ["", "## Rows", "", *_table(LENGTH_HEADERS, length_table(results))]
    for file, title in images.items():
        lines += ["", f"![{_escape(title)}]({file})"]
    lines += ["", f"Measured on: {describe_machine(results)}.", ""]
    return "\n".join(lines)


def _group_section(results: Results, group: str) -> list[str]:
    rows = [[_escape(cell) for cell in row] for row in arm_table(results, group)]
    verdicts = [
        f"- **{_escape(each.arm)}**: {_escape(each.verdict)}"
        for each in compare_arms(results)
        if each.group == group
    ]
    advice = [
        f"- **Batch**: {each.text} ({each.steps} step estimates.)"
        for each in batch_size_advice(results)
        if each.group == group
    ]
    return ["", f"## {_escape(group)}", "", *_table(ARM_HEADERS, rows), "", *verdicts, *advice]


def arm_table(results: Results, group: str) -> list[list[str]]:
    """The measurements of a group.

    Args:
        results: The results.
        group: The group's name.

    Returns:
        A row of cells for each arm, under `ARM_HEADERS`.
    """
    comparisons = {each.arm: each for each in compare_arms(results) if each.group == group}
    return [_arm_row(arm, comparisons.get(arm.label)) for arm in results.groups()[group]]


def _arm_row(arm: ArmResult, comparison: ArmComparison | None) -> list[str]:
    change = comparison.change if comparison else None
    difference = comparison.gradient_difference if comparison else None
    cosine = comparison.cosine if comparison else None
    ratio = comparison.ratio if comparison else None
    return [
        arm.label,
        _format_losses(arm),
        "reference" if arm.reference else format_change(change),
        _format(difference, ".1e"),
        _format(cosine, ".4f"),
        f"x {format_range(*ratio)}" if ratio else "-",
        _format(_mean([run.distance for run in arm.finished()]), ".1e"),
        _format(_mean([run.tokens_per_second for run in arm.finished()]), ",.0f"),
        _format_peak([run.peak_bytes for run in arm.runs]),
    ]


def length_table(results: Results) -> list[list[str]]:
    """How unequal the rows are.

    Args:
        results: The results.

    Returns:
        A row of cells for each share of cut completions, under `LENGTH_HEADERS`.
    """
    return [
        [
            f"{lengths.cut:.0%}",
            f"{lengths.rows:,}",
            f"{lengths.p10:.0f}",
            f"{lengths.p50:.0f}",
            f"{lengths.p90:.0f}",
            f"{lengths.spread:.2f}",
        ]
        for lengths in results.lengths
    ]


def explain_normalisations(results: Results) -> dict[str, str]:
    """What each normalisation in the study means.

    Args:
        results: The results.

    Returns:
        A sentence by normalisation.
    """
    used = {arm.normalisation for arm in results.arms}
    return {name: text for name, text in EXPLANATIONS.items() if name in used}


def describe_settings(results: Results) -> str:
    """How the arms were run.

    Args:
        results: The results.

    Returns:
        A sentence without its full stop.
    """
    spec = results.spec
    max_grad_norm = spec["max_grad_norm"]
    seeds = sorted({run.seed for arm in results.arms for run in arm.runs})
    rates = sorted({f"{arm.lr:g}" for arm in results.arms})
    clipping = (
        "no clipping" if max_grad_norm is None else f"gradient norm clipped at {max_grad_norm:g}"
    )
    return (
        f"{spec['steps']} steps, {spec['optimizer']}, learning rate {', '.join(rates)} "
        f"({spec['schedule']}), {clipping}, {results.precision}, {spec['init']} weights, seeds "
        f"{', '.join(map(str, seeds))}"
    )


def describe_machine(results: Results) -> str:
    """Where the arms were run, and with which versions.

    Args:
        results: The results.

    Returns:
        A sentence without its full stop.
    """
    facts = {**results.machine, **results.versions}
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the cells are escaped already."""
    return [_table_line(row) for row in (headers, ["---"] * len(headers), *rows)]


def _table_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


_ESCAPES = str.maketrans(
    {mark: f"\\{mark}" for mark in "\\`*_[]|#"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
)


def _escape(text: str) -> str:
    return printable(text.replace("\n", " ").replace("\t", " ")).translate(_ESCAPES)


def _format_losses(arm: ArmResult) -> str:
    losses = list(final_losses(arm).values())
    if not losses:
        return "diverged"
    mean = f"{statistics.fmean(losses):.4f}"
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    diverged = len(arm.runs) - len(losses)
    return mean + spread + (f" ({diverged} diverged, left out)" if diverged else "")


def _format(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _mean(values: Iterable[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return statistics.fmean(measured) if measured else None


def _format_peak(values: Iterable[int | None]) -> str:
    measured = [value for value in values if value is not None]
    return f"{max(measured) / 2**30:.2f} GiB" if measured else "-"
