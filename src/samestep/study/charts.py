"""The figures of a report, as Altair charts: one for the page, the same for PNG."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from samestep.study.compare import final_losses
from samestep.study.results import ArmResult, Results, Run

COLOURS = (
    *("#2563eb", "#f97316", "#16a34a", "#dc2626", "#9333ea"),
    *("#0891b2", "#ca8a04", "#db2777", "#64748b", "#65a30d"),
)
"""One an arm; readable on white and on dark."""

Curve = Callable[[Run], tuple[Sequence[int], Sequence[float]]]


def colours(results: Results) -> dict[str, str]:
    """A colour for each label, the same in every figure."""
    labels = dict.fromkeys(arm.label for arm in results.arms)
    return {label: COLOURS[at % len(COLOURS)] for at, label in enumerate(labels)}


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        title: What it shows.
        group: The group of arms, or None for the whole study.
        chart: An Altair chart with a parameter ``hidden``, a list of arms that are left out.
    """

    title: str
    group: str | None
    chart: Any


def figures(results: Results) -> dict[str, Figure]:
    """All figures of a study that have something to show.

    Args:
        results: The results.

    Returns:
        The figures by file name (without ending).
    """
    found: dict[str, Figure] = {}
    if len(results.lengths) > 1:
        found["map"] = Figure(
            "What the spread of completion lengths does to the training", None, _map(results)
        )
    for number, (group, arms) in enumerate(results.groups().items(), start=1):
        for name, title, curve, log in _CURVES:
            rows = [row for arm in arms for row in _band(arm, curve)]
            if rows and (not log or any(row["mean"] > 0 for row in rows)):
                chart = _lines(rows, arms, results, axis=title, log=log)
                found[f"{number}-{name}"] = Figure(title, group, chart)
    return found


def _numbered(values: Sequence[float]) -> tuple[Sequence[int], Sequence[float]]:
    return range(1, len(values) + 1), values


_CURVES: tuple[tuple[str, str, Curve, bool], ...] = (
    (
        "evaluation-loss",
        "Evaluation loss (exact, a token)",
        lambda run: (run.evaluations.step, run.evaluations.loss),
        False,
    ),
    (
        "train-loss",
        "Token loss on the step's batch (exact)",
        lambda run: _numbered(run.steps.loss),
        False,
    ),
    (
        "gradient-difference",
        "Relative difference to the undivided batch's gradient",
        lambda run: (run.gradients.step, run.gradients.relative_difference),
        True,
    ),
    (
        "gradient-norm",
        "Gradient norm before clipping",
        lambda run: _numbered(run.steps.grad_norm),
        True,
    ),
)


def _band(arm: ArmResult, curve: Curve) -> list[dict[str, Any]]:
    """Mean, lowest and highest value over the seeds at each step."""
    by_step: dict[int, list[float]] = {}
    for run in arm.finished() or arm.runs:
        for step, value in zip(*curve(run), strict=True):
            by_step.setdefault(step, []).append(value)
    return [
        {
            "arm": arm.label,
            "step": step,
            "mean": float(f"{np.mean(values):.6g}"),
            "low": float(f"{min(values):.6g}"),
            "high": float(f"{max(values):.6g}"),
            "seeds": len(values),
        }
        for step, values in sorted(by_step.items())
    ]


def _lines(
    rows: list[dict[str, Any]],
    arms: list[ArmResult],
    results: Results,
    *,
    axis: str,
    log: bool,
) -> Any:
    import altair as alt

    rows = [row for row in rows if row["low"] > 0] if log else rows
    hidden = alt.param(name="hidden", value=[])
    if log:
        powers = _powers(min(row["low"] for row in rows), max(row["high"] for row in rows))
        scale = alt.Scale(type="log", domain=[powers[0], powers[-1]])
        values = alt.Axis(format=".0e", values=powers)
    else:
        scale, values = alt.Scale(zero=False), alt.Axis(format="~g", tickCount=5)
    base = (
        alt.Chart(alt.Data(values=rows))
        .transform_filter("indexof(hidden, datum.arm) < 0")
        .encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1)),
            color=_colour([arm.label for arm in arms], results),
        )
    )
    band = base.mark_area(opacity=0.18).encode(
        y=alt.Y("low:Q", scale=scale, axis=values, title=axis), y2="high:Q"
    )
    few = max((sum(row["arm"] == arm.label for row in rows) for arm in arms), default=0) <= 25
    # Exact arms lie on each other: the reference is wide, so that it shows behind the others.
    reference = [arm.label for arm in arms if arm.reference]
    line = base.mark_line(point=few).encode(
        y="mean:Q",
        strokeWidth=alt.condition(
            alt.FieldOneOfPredicate(field="arm", oneOf=reference), alt.value(6), alt.value(2)
        ),
    )
    hover = base.mark_point(size=140, opacity=0).encode(
        y="mean:Q",
        tooltip=[
            alt.Tooltip("arm:N"),
            alt.Tooltip("step:Q"),
            alt.Tooltip("mean:Q", format=".4g"),
            alt.Tooltip("low:Q", format=".4g", title="lowest seed"),
            alt.Tooltip("high:Q", format=".4g", title="highest seed"),
            alt.Tooltip("seeds:Q"),
        ],
    )
    return alt.layer(band, line, hover).add_params(hidden)


def _powers(low: float, high: float) -> list[float]:
    """About six powers of ten that enclose a range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 6))
    last = first + every * max(1, math.ceil((last - first) / every))
    return [10.0**power for power in range(first, last + 1, every)]


def _colour(labels: Sequence[str], results: Results) -> Any:
    import altair as alt

    chosen = colours(results)
    labels = list(dict.fromkeys(labels))
    return alt.Color(
        "arm:N",
        title=None,
        scale=alt.Scale(domain=labels, range=[chosen[label] for label in labels]),
        legend=alt.Legend(orient="bottom", columns=2, labelLimit=300, symbolOpacity=1),
    )


def _map(results: Results) -> Any:
    """Change of the evaluation loss by the spread of lengths; a dot a seed."""
    import altair as alt

    spread = {one.cut: one.spread for one in results.lengths}
    rows = []
    for arms in results.groups().values():
        reference = next((arm for arm in arms if arm.reference), None)
        base = final_losses(reference) if reference else {}
        for arm in arms:
            rows += [
                {
                    "arm": arm.label,
                    "seed": seed,
                    "cut": arm.cut,
                    "spread": round(spread[arm.cut], 4),
                    "change": float(f"{loss - base[seed]:.6g}"),
                }
                for seed, loss in final_losses(arm).items()
                if seed in base and not arm.reference
            ]
    base_chart = (
        alt.Chart(alt.Data(values=rows))
        .transform_filter("indexof(hidden, datum.arm) < 0")
        .encode(
            x=alt.X(
                "spread:Q",
                title="spread of targets a row (std / mean)",
                axis=alt.Axis(tickCount=6),
                scale=alt.Scale(zero=False, padding=20),
            ),
            y=alt.Y("change:Q", title="evaluation loss minus the reference's"),
            color=_colour([str(row["arm"]) for row in rows], results),
        )
    )
    dots = base_chart.mark_circle(size=60, opacity=0.8).encode(
        tooltip=[
            alt.Tooltip("arm:N"),
            alt.Tooltip("seed:Q"),
            alt.Tooltip("cut:Q", format=".0%", title="completions cut"),
            alt.Tooltip("spread:Q", format=".3g"),
            alt.Tooltip("change:Q", format="+.4f"),
        ]
    )
    means = base_chart.mark_line(strokeWidth=2).encode(y="mean(change):Q")
    zero = (
        alt.Chart(alt.Data(values=[{"zero": 0}]))
        .mark_rule(strokeDash=[4, 4], color="#94a3b8")
        .encode(y="zero:Q")
    )
    return alt.layer(zero, means, dots).add_params(alt.param(name="hidden", value=[]))
