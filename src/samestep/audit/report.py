"""The report of an audit, in a terminal and as a page; from its JSON form, without PyTorch."""

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from samestep.errors import ConfigError
from samestep.utils.extras import install_command

PAGE_TEMPLATE = Path(__file__).with_name("page.html")
COLOURS = {"exact": "green", "inexact": "red", "skipped": "dim"}


def print_report(report: dict[str, Any], console: Console, *, verbose: bool = False) -> None:
    """Print the verdict, a paragraph for each cause, then a table of the axes.

    Args:
        report: `samestep.audit.check.CheckReport.as_dict`.
        console: Where to.
        verbose: Say of each skipped axis why it was.
    """
    colour = COLOURS[report["verdict"]]
    console.print(
        f"{escape(report['subject'])}: [{colour}]{report['verdict']}[/] "
        f"({report['examples']} examples, {report['dtype']} gradients)"
    )
    for cause, axes in _by_cause(report).items():
        console.print(_paragraph(cause, axes))
    run = [axis for axis in report["axes"] if axis["verdict"] != "skipped"]
    console.print(_table(run, console.width))
    skipped = [axis for axis in report["axes"] if axis["verdict"] == "skipped"]
    if verbose:
        for axis in skipped:
            console.print(f"[dim]{escape(axis['name'])} skipped: {escape(axis['reason'])}[/]")
    elif skipped:
        names = ", ".join(axis["name"] for axis in skipped)
        console.print(f"[dim]skipped: {escape(names)} (--verbose says why)[/]")


def _table(axes: list[dict[str, Any]], width: int) -> Table:
    """The axes that were run; without the last numbers where names would have to be cut."""
    columns = {
        "axis": [escape(axis["name"]) for axis in axes],
        "verdict": [f"[{COLOURS[axis['verdict']]}]{axis['verdict']}[/]" for axis in axes],
        "differs": [format_number(axis["relative_difference"], ".1e") for axis in axes],
        "scale": [format_number(axis["ratio"], ".4g") for axis in axes],
        "cosine": [format_number(axis["cosine"], ".4f") for axis in axes],
        "noise": [format_number(axis["noise_floor"], ".0e") for axis in axes],
        "cause": [escape(axis["cause"] or "") for axis in axes],
    }

    def build() -> Table:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        for name in columns:
            table.add_column(name, no_wrap=name == "axis", overflow="fold")
        for row in zip(*columns.values(), strict=True):
            table.add_row(*row)
        return table

    measured = Console(width=1000, color_system=None)
    for dispensable in ("noise", "cosine", "scale", "differs"):
        if measured.measure(build()).maximum <= width:
            break
        del columns[dispensable]
    return build()


def _by_cause(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The inexact axes of each cause, in the order of the report."""
    axes: dict[str, list[dict[str, Any]]] = {}
    for axis in report["axes"]:
        if axis["verdict"] == "inexact":
            axes.setdefault(axis["cause"], []).append(axis)
    return axes


def _paragraph(cause: str, axes: list[dict[str, Any]]) -> Panel:
    first = axes[0]
    names = ", ".join(axis["name"] for axis in axes)
    lines = [escape(first["advice"]), "", f"[dim]compared:[/] {escape(first['reason'])}"]
    if first["evidence"]:
        lines.append(f"[dim]evidence:[/] {escape(first['evidence'])}")
    if first["worst"]:
        weights = ", ".join(f"{name} {value:.1e}" for name, value in first["worst"][:3])
        lines.append(f"[dim]worst weights:[/] {escape(weights)}")
    return Panel("\n".join(lines), title=f"{escape(cause)} ({names})", title_align="left")


def format_number(value: float | None, form: str) -> str:
    """A number in a form, or nothing."""
    return "" if value is None else format(value, form)


def render_page(report: dict[str, Any]) -> str:
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

        from samestep.audit.charts import draw_axes, draw_weights

        overview = Markup(draw_axes(report["axes"]))
        pictures = {
            axis["name"]: Markup(draw_weights(axis))
            for axis in report["axes"]
            if axis["verdict"] == "inexact" and axis["worst"]
        }
    except ImportError as error:
        raise ConfigError(f"html: {error}: {install_command('report')}") from error
    template = Environment(autoescape=True).from_string(PAGE_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        report=report,
        causes=_by_cause(report),
        overview=overview,
        pictures=pictures,
        number=format_number,
        raw=json.dumps(report, indent=2),
    )
