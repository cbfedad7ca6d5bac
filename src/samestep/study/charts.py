"""The figures of a report, as Altair charts: one for the page, the same for PNG."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np

from samestep.study.comparison import final_losses
from samestep.study.results import ArmResult, Results, Run

_COLOURS = (
    *("#2563eb", "#f97316", "#16a34a", "#dc2626", "#9333ea"),
    *("#0891b2", "#ca8a04", "#db2777", "#64748b", "#65a30d"),
)
"""One an arm; readable on white and on dark."""

_FEWEST_FOR_A_LINE = 2
"""Points of a curve up to which it is drawn as points alone."""

_MOST_POINTS = 25
"""Curves of more steps are drawn without a dot at each."""


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

    @property
    def caption(self) -> str:
        """The title, with the group if it is of one."""
        return f"{self.title}: {self.group}" if self.group else self.title


def arm_colours(results: Results) -> dict[str, str]:
    """A colour for each arm, the same in every figure.

    Args:
        results: The results.

    Returns:
        Colour by label.
    """
    labels = dict.fromkeys(arm.label for arm in results.arms)
    return {label: _COLOURS[at % len(_COLOURS)] for at, label in enumerate(labels)}


def draw_figures(results: Results) -> dict[str, Figure]:
    """All figures of a study that have something to show.

    Args:
        results: The results.

    Returns:
        The figures by file name (without ending).
    """
    figures: dict[str, Figure] = {}
    if len(results.lengths) > 1:
        title = "What the spread of completion lengths does to the training"
        figures["map"] = Figure(title, None, _spread_chart(results))
    for number, (group, arms) in enumerate(results.groups().items(), start=1):
        for curve in _CURVES:
            points = [point for arm in arms for point in _summarise_seeds(arm, curve)]
            if points and (not curve.log or any(point["mean"] > 0 for point in points)):
                chart = _curve_chart(points, arms, results=results, curve=curve)
                figures[f"{number}-{curve.name}"] = Figure(curve.title, group, chart)
    return figures


@dataclass(frozen=True)
class _Curve:
    """A quantity by step; ``log``: on a logarithmic axis."""

    name: str
    title: str
    steps_and_values: Callable[[Run], tuple[Sequence[int], Sequence[float]]]
    log: bool = False


def _with_step_numbers(values: Sequence[float]) -> tuple[Sequence[int], Sequence[float]]:
    return range(1, len(values) + 1), values


_CURVES = (
    _Curve(
        "evaluation-loss",
        "Evaluation loss (exact, a token)",
        lambda run: (run.evaluations.step, run.evaluations.loss),
    ),
    _Curve(
        "train-loss",
        "Token loss on the step's batch (exact)",
        lambda run: _with_step_numbers(run.steps.loss),
    ),
    _Curve(
        "gradient-difference",
        "Relative difference to the undivided batch's gradient",
        lambda run: (run.gradients.step, run.gradients.relative_difference),
        log=True,
    ),
    _Curve(
        "gradient-norm",
        "Gradient norm before clipping",
        lambda run: _with_step_numbers(run.steps.grad_norm),
        log=True,
    ),
)


def _summarise_seeds(arm: ArmResult, curve: _Curve) -> list[dict[str, Any]]:
    """Mean, lowest and highest value over the seeds at each step."""
    by_step: dict[int, list[float]] = {}
    for run in arm.finished() or arm.runs:
        for step, value in zip(*curve.steps_and_values(run), strict=True):
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


def _curve_chart(
    points: list[dict[str, Any]], arms: Sequence[ArmResult], *, results: Results, curve: _Curve
) -> Any:
    """Mean over the seeds by step, in a band from the lowest to the highest seed."""
    if curve.log:
        points = [point for point in points if point["low"] > 0]
    scale, axis = _value_axis(points, curve)
    base = (
        alt.Chart(alt.Data(values=points))
        .transform_filter("indexof(hidden, datum.arm) < 0")
        .encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1)),
            color=_arm_colour([arm.label for arm in arms], results),
        )
    )
    band = base.mark_area(opacity=0.18).encode(
        y=alt.Y("low:Q", scale=scale, axis=axis, title=curve.title), y2="high:Q"
    )
    longest = max((sum(point["arm"] == arm.label for point in points) for arm in arms), default=0)
    # Exact arms lie on each other: the reference is wide, so that it shows behind the others.
    references = [arm.label for arm in arms if arm.reference]
    # Between two measurements nothing is known: no line pretends to.
    curve_mark = (
        base.mark_line(point=longest <= _MOST_POINTS)
        if longest > _FEWEST_FOR_A_LINE
        else base.mark_point(filled=True, size=60)
    )
    line = curve_mark.encode(
        y="mean:Q",
        strokeWidth=alt.condition(
            alt.FieldOneOfPredicate(field="arm", oneOf=references), alt.value(6), alt.value(2)
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
    return alt.layer(band, line, hover).add_params(alt.param(name="hidden", value=[]))


def _value_axis(points: list[dict[str, Any]], curve: _Curve) -> tuple[Any, Any]:
    """Scale and axis of the values of a curve."""
    if not curve.log:
        return alt.Scale(zero=False), alt.Axis(format="~g", tickCount=5)
    powers = _powers_of_ten(
        min(point["low"] for point in points), max(point["high"] for point in points)
    )
    scale = alt.Scale(type="log", domain=[powers[0], powers[-1]])
    return scale, alt.Axis(format=".0e", values=powers)


def _powers_of_ten(low: float, high: float) -> list[float]:
    """About six powers of ten that enclose a range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 6))
    last = first + every * max(1, math.ceil((last - first) / every))
    return [10.0**power for power in range(first, last + 1, every)]


def _arm_colour(labels: Sequence[str], results: Results) -> Any:
    colours = arm_colours(results)
    domain = list(dict.fromkeys(labels))
    return alt.Color(
        "arm:N",
        title=None,
        scale=alt.Scale(domain=domain, range=[colours[label] for label in domain]),
        legend=alt.Legend(orient="bottom", columns=2, labelLimit=300, symbolOpacity=1),
    )


def _spread_chart(results: Results) -> Any:
    """Change of the evaluation loss by the spread of lengths; a dot a seed."""
    points = _final_changes(results)
    base = (
        alt.Chart(alt.Data(values=points))
        .transform_filter("indexof(hidden, datum.arm) < 0")
        .encode(
            x=alt.X(
                "spread:Q",
                title="spread of targets a row (std / mean)",
                axis=alt.Axis(tickCount=6),
                scale=alt.Scale(zero=False, padding=20),
            ),
            y=alt.Y("change:Q", title="evaluation loss minus the reference's"),
            color=_arm_colour([str(point["arm"]) for point in points], results),
        )
    )
    dots = base.mark_circle(size=60, opacity=0.8).encode(
        tooltip=[
            alt.Tooltip("arm:N"),
            alt.Tooltip("seed:Q"),
            alt.Tooltip("cut:Q", format=".0%", title="completions cut"),
            alt.Tooltip("spread:Q", format=".3g"),
            alt.Tooltip("change:Q", format="+.4f"),
        ]
    )
    means = base.mark_line(strokeWidth=2).encode(y="mean(change):Q")
    zero = (
        alt.Chart(alt.Data(values=[{"zero": 0}]))
        .mark_rule(strokeDash=[4, 4], color="#94a3b8")
        .encode(y="zero:Q")
    )
    return alt.layer(zero, means, dots).add_params(alt.param(name="hidden", value=[]))


def _final_changes(results: Results) -> list[dict[str, Any]]:
    """The last evaluation loss of each run minus the reference's with the same seed."""
    spread = {lengths.cut: lengths.spread for lengths in results.lengths}
    points = []
    for arms in results.groups().values():
        reference = next((arm for arm in arms if arm.reference), None)
        reference_losses = final_losses(reference) if reference else {}
        for arm in arms:
            points += [
                {
                    "arm": arm.label,
                    "seed": seed,
                    "cut": arm.cut,
                    "spread": round(spread[arm.cut], 4),
                    "change": float(f"{loss - reference_losses[seed]:.6g}"),
                }
                for seed, loss in final_losses(arm).items()
                if seed in reference_losses and not arm.reference
            ]
    return points
