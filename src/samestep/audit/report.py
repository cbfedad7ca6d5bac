"""The report of an audit in a terminal. Works on the JSON form, so it needs no PyTorch."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

COLOURS = {"exact": "green", "inexact": "red", "skipped": "dim"}


def show(report: dict[str, Any], console: Console) -> None:
    """Print a table of the axes, then a paragraph for each cause.

    Args:
        report: `samestep.audit.check.CheckReport.as_dict`.
        console: Where to.
    """
    heads = ("axis", "verdict", "scale", "cosine", "difference", "noise")
    table = Table(*heads, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("cause", overflow="fold")  # never cut short
    for axis in report["axes"]:
        verdict = axis["verdict"]
        table.add_row(
            axis["name"],
            f"[{COLOURS[verdict]}]{verdict}[/]",
            number(axis["ratio"], ".4g"),
            number(axis["cosine"], ".4f"),
            number(axis["relative_difference"], ".1e"),
            number(axis["noise_floor"], ".0e"),
            escape(axis["cause"] or ""),
        )
    console.print(table)
    for axis in report["axes"]:
        if axis["verdict"] == "skipped":
            console.print(f"[dim]{axis['name']} skipped: {escape(axis['reason'])}[/]")
    for cause, axes in by_cause(report).items():
        console.print(_paragraph(cause, axes))
    colour = COLOURS[report["verdict"]]
    console.print(
        f"{escape(report['subject'])}: [{colour}]{report['verdict']}[/] "
        f"({report['examples']} examples, {report['dtype']} gradients)"
    )


def by_cause(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The inexact axes of each cause, in the order of the report."""
    found: dict[str, list[dict[str, Any]]] = {}
    for axis in report["axes"]:
        if axis["verdict"] == "inexact":
            found.setdefault(axis["cause"], []).append(axis)
    return found


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


def number(value: float | None, form: str) -> str:
    """A number in a form, or nothing."""
    return "" if value is None else format(value, form)
