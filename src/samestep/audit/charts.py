"""Charts of an audit as SVG: how far each axis is from its noise, and which weights differ."""

from typing import Any

import altair
import vl_convert

SMALLEST = 1e-17
"""Stands for zero on a log axis."""

COLOURS = {"exact": "#15803d", "inexact": "#c2410c"}


def draw_axes(axes: list[dict[str, Any]]) -> str:
    """Each axis that was run: its noise, and how far the step moved, on one log scale.

    Args:
        axes: Of a report in its JSON form.

    Returns:
        SVG; nothing where no axis has a number.
    """
    rows = [
        {
            "axis": axis["name"],
            "verdict": axis["verdict"],
            "measured noise": max(axis["noise_floor"] or 0.0, SMALLEST),
            "difference": max(axis["relative_difference"], SMALLEST),
        }
        for axis in axes
        if axis["verdict"] != "skipped" and axis["relative_difference"] is not None
    ]
    if not rows:
        return ""
    base = altair.Chart(altair.Data(values=rows)).encode(
        y=altair.Y("axis:N", sort=None, title=None, axis=altair.Axis(labelLimit=320)),
        color=altair.Color(
            "verdict:N",
            scale=altair.Scale(domain=list(COLOURS), range=list(COLOURS.values())),
            legend=altair.Legend(title=None, orient="top"),
        ),
    )
    # To 1 on the right, a step of another length: what is exact stays near the left edge.
    values = [row[name] for row in rows for name in ("measured noise", "difference")]
    scale = altair.Scale(type="log", domain=[min(values) / 2, max(1.0, *values)], nice=False)
    title = "relative difference of the step (line: from the measured noise)"
    noise = altair.X(
        "measured noise:Q",
        scale=scale,
        title=title,
        axis=altair.Axis(format=".0e", tickCount=6),
    )
    chart = altair.layer(
        base.mark_rule(strokeWidth=2).encode(x=noise, x2="difference:Q"),
        base.mark_tick(thickness=2, size=12).encode(x=noise),
        base.mark_point(filled=True, size=70, opacity=1).encode(
            x=altair.X("difference:Q", scale=scale)
        ),
    )
    return _as_svg(chart)


def draw_weights(axis: dict[str, Any]) -> str:
    """The weights that an axis changes most, in percent of their own gradient.

    Args:
        axis: Of a report in its JSON form; it has ``worst``.

    Returns:
        SVG.
    """
    rows = [{"weight": name, "percent": 100 * value} for name, value in axis["worst"]]
    bars = altair.Chart(altair.Data(values=rows)).encode(
        x=altair.X(
            "percent:Q",
            scale=altair.Scale(zero=True),
            title="difference in percent of the weight's own change",
        ),
        y=altair.Y("weight:N", sort=None, title=None, axis=altair.Axis(labelLimit=320)),
    )
    text = bars.mark_text(align="left", dx=4, color="#64748b").encode(
        text=altair.Text("percent:Q", format=".2~g")
    )
    return _as_svg(altair.layer(bars.mark_bar(color=COLOURS["inexact"]), text))


def _as_svg(chart: altair.LayerChart) -> str:
    # Room on the left: browsers' letters are wider than those that the labels are measured by.
    padding = {"left": 56, "right": 24, "top": 8, "bottom": 8}
    styled = chart.properties(width=420, background="transparent", padding=padding).configure(
        axis=altair.AxisConfig(labelColor="#64748b", titleColor="#64748b", gridColor="#94a3b833"),
        legend=altair.LegendConfig(labelColor="#64748b"),
        view=altair.ViewConfig(stroke=None),
    )
    svg: str = vl_convert.vegalite_to_svg(styled.to_json())
    return svg
