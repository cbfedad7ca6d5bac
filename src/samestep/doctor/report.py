"""The doctor's report in a terminal, from its JSON form."""

import textwrap
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from samestep.audit.report import COLOURS, print_report
from samestep.utils.text import printable

COLUMNS = {
    "micro-batch": "step",
    "short-window": "last window",
    "reported": "logs",
    "evaluation-batch": "evaluation",
}
VISIBLE = 0.005
"""From which relative change on a scale is shown as a factor."""


def print_doctor(report: Mapping[str, Any], console: Console) -> None:
    """Print what is installed, what is known of it, what was found, and what to do.

    Args:
        report: See `samestep.doctor.command.examine`.
        console: Where to.
    """
    versions = report["versions"]
    there = [f"{name} {number}" for name, number in versions.items() if number is not None]
    absent = [name for name, number in versions.items() if number is None]
    console.print(f"[bold]Installed[/]: {escape(', '.join(there))}")
    if absent:
        console.print(f"not installed: {', '.join(absent)}")
    if report["known"]:
        console.print("\n[bold]Known[/]")
        for line in report["known"]:
            _print_indented(line.strip(), console, indent=len(line) - len(line.lstrip()) + 2)
    probes = [probe for probe in report["probes"] if not _is_users(probe)]
    if probes:
        console.print("\n[bold]Tried here[/]: 8 ragged rows, cut in several ways, tiny models")
        console.print(_table(probes))
    for probe in report["probes"]:
        if _is_users(probe):
            console.print()
            _print_users(probe, console)
    console.print("\n[bold]What to do[/]")
    for line in report["advice"]:
        _print_indented(line, console)


def _print_indented(text: str, console: Console, *, indent: int = 2) -> None:
    """A text as a paragraph, its first line by two letters further left than the others."""
    first, others = " " * indent, " " * (indent + 2)
    for line in printable(text).splitlines():
        wrapped = textwrap.fill(line, console.width, initial_indent=first, subsequent_indent=others)
        console.print(wrapped, markup=False, soft_wrap=True)


def _is_users(probe: Mapping[str, Any]) -> bool:
    return ":" in probe["probe"]


def _print_users(probe: Mapping[str, Any], console: Console) -> None:
    """The whole report on a subject of the user's, by the name under which it was given."""
    if probe["verdict"] == "not run":
        console.print(f"[bold]{escape(probe['title'])}[/]: not run")
        _print_indented(probe["why"], console)
        return
    console.print(f"[bold]{escape(probe['title'])}[/]")
    print_report(dict(probe), console)


def _table(probes: list[Mapping[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("")
    for title in COLUMNS.values():
        table.add_column(title)
    for probe in probes:
        if probe["verdict"] == "not run":
            table.add_row(escape(probe["title"]), "not run", "", "", "")
            continue
        table.add_row(escape(probe["title"]), *_cells(probe["axes"]))
        cure = probe["cure"]
        if cure is not None and cure["verdict"] != "not run":
            short = cure["name"].partition("(")[0].removeprefix("samestep.")
            seen = {axis["name"]: axis for axis in probe["axes"]}
            seen |= {axis["name"]: axis for axis in cure["axes"]}
            table.add_row(f"  [dim]with {escape(short)}[/]", *_cells(list(seen.values())))
    return table


def _cells(axes: list[Mapping[str, Any]]) -> list[str]:
    found = {axis["name"]: axis for axis in axes}
    return [_cell(found.get(name)) for name in COLUMNS]


def _cell(axis: Mapping[str, Any] | None) -> str:
    """A verdict: a factor where that is visible, else how far off."""
    if axis is None or axis["verdict"] == "skipped":
        return ""
    if axis["verdict"] == "exact":
        return f"[{COLOURS['exact']}]exact[/]"
    ratio, difference = axis["ratio"], axis["relative_difference"]
    text = "inexact"
    if ratio is not None and abs(ratio - 1) >= VISIBLE:
        text = f"x {ratio:.4g}"
    elif difference is not None:
        text = f"off by {difference:.0e}"
    return f"[{COLOURS['inexact']}]{text}[/]"
