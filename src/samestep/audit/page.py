"""The report of an audit as one page that needs no network."""

import json
from pathlib import Path
from typing import Any

from samestep.audit.report import by_cause, number
from samestep.errors import ConfigError

TEMPLATE = Path(__file__).with_name("page.html")


def page(report: dict[str, Any]) -> str:
    """A self-contained HTML page: verdict, causes, a picture of the weights, the table.

    Args:
        report: `samestep.audit.check.CheckReport.as_dict`.

    Returns:
        HTML; every text of the subject's is escaped.

    Raises:
        ConfigError: The packages of ``samestep[report]`` are not installed.
    """
    try:
        from jinja2 import Environment
        from markupsafe import Markup

        pictures = {
            axis["name"]: Markup(_picture(axis))
            for axis in report["axes"]
            if axis["verdict"] == "inexact" and axis["worst"]
        }
    except ImportError as error:
        raise ConfigError(f"html: {error}: pip install 'samestep[report]'") from error
    template = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        report=report,
        causes=by_cause(report),
        pictures=pictures,
        number=number,
        raw=json.dumps(report, indent=2),
    )


def _picture(axis: dict[str, Any]) -> str:
    """Bars of the relative difference of each weight, on a log axis, as SVG."""
    import altair
    import vl_convert

    noise = max(axis["noise_floor"] or 0.0, 1e-17)
    rows = [
        {"weight": name, "relative difference": max(value, noise), "from": noise}
        for name, value in axis["worst"]
    ]
    chart = (
        altair.Chart(altair.Data(values=rows))
        .mark_bar(color="#c2410c")
        .encode(
            x=altair.X(
                "relative difference:Q",
                scale=altair.Scale(type="log", domain=[noise, max(1.0, axis["worst"][0][1])]),
                axis=altair.Axis(format=".0e", tickCount=6),
                title="relative difference (left edge: noise)",
            ),
            x2="from:Q",
            y=altair.Y("weight:N", sort=None, title=None, axis=altair.Axis(labelLimit=320)),
        )
        # Room on the left: browsers' letters are wider than those that the labels are measured by.
        .properties(
            width=420,
            background="transparent",
            padding={"left": 56, "right": 8, "top": 8, "bottom": 8},
        )
        .configure_axis(labelColor="#64748b", titleColor="#64748b", gridColor="#94a3b833")
    )
    svg: str = vl_convert.vegalite_to_svg(chart.to_json())
    return svg
