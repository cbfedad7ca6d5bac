"""Writes the tables of the pages from the tables in the code: none of their rows is typed in.

    python docs/generate_tables.py            writes them
    python docs/generate_tables.py --check    exit code 1 if a page is out of date

A page holds a table between ``<!-- table: NAME -->`` and ``<!-- end of table -->``.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from samestep.audit.axes.table import AXES
from samestep.audit.causes import CAUSES
from samestep.train.optim import OPTIMIZERS, SCHEDULES
from samestep.train.settings.evaluation import METRICS

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
_PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def axes() -> str:
    """The axes of `samestep check`."""
    rows = [
        (f"`{axis.name}`", axis.invariance + (" (only on request)" if axis.on_request else ""))
        for axis in AXES.values()
    ]
    return markdown_table(("axis", "what may not change the step"), rows)


def causes() -> str:
    """The causes that `samestep check` names."""
    rows = [(f"`{cause.name}`", cause.meaning) for cause in CAUSES.values()]
    return markdown_table(("cause", "what it is"), rows)


def optimizers() -> str:
    """The optimizers of `samestep train`."""
    rows = [
        (f"`{name}`", f"{row.about} (`{row.factory}`)", str(row.state_per_weight))
        for name, row in OPTIMIZERS.items()
    ]
    return markdown_table(("`optimizer`", "what it is", "state, in elements a weight"), rows)


def schedules() -> str:
    """The learning-rate schedules of `samestep train`."""
    rows = []
    for name, function in SCHEDULES.items():
        about = (function.__doc__ or "").split("\n", maxsplit=1)[0].rstrip(".")
        rows.append((f"`{name}`", f"{about[0].lower()}{about[1:]}"))
    return markdown_table(("`schedule`", "after warm-up the rate"), rows)


def metrics() -> str:
    """The metrics that `samestep train` reports beside the loss."""
    rows = [(f"`{name}`", row.about) for name, row in METRICS.items()]
    return markdown_table(("`metrics`", "what it is"), rows)


def corpus() -> str:
    """What `make corpus` found, by family."""
    record = json.loads((RESULTS / "corpus.json").read_text(encoding="utf-8"))
    rows = [
        (
            family,
            str(one["bugs"]),
            f"{one['detected']} of {one['audits_of_bugs']}",
            f"{one['right_cause']} of {one['audits_of_bugs']}",
            str(one["sound"]),
            f"{one['false_alarms']} of {one['audits_of_sound']}",
        )
        for family, one in {**record["families"], "**all**": record}.items()
    ]
    heads = ("family", "bugs", "detected", "rightly named", "sound", "false alarms")
    seeds = ", ".join(map(str, record["seeds"]))
    return f"{markdown_table(heads, rows)}\nMeasured at seed {seeds}.\n"


def blind(name: str) -> Callable[[], str]:
    """What a run of the blind subjects wrote."""

    def table() -> str:
        text = (RESULTS / f"check_{name}.md").read_text(encoding="utf-8")
        return "".join(line + "\n" for line in text.splitlines() if line.startswith("|"))

    return table


TABLES: dict[str, Callable[[], str]] = {
    "axes": axes,
    "causes": causes,
    "metrics": metrics,
    "optimizers": optimizers,
    "schedules": schedules,
    "corpus": corpus,
    "blind-before": blind("blind_before"),
    "blind-fresh-before": blind("blind_fresh_before"),
    "blind-fresh-after": blind("blind_fresh_after"),
}
"""By the name that stands in a page."""


def generate(text: str) -> str:
    """A page with its tables as the code has them.

    Args:
        text: The page.

    Raises:
        KeyError: It names a table that there is not.
    """
    return _PLACE.sub(lambda place: f"{place[1]}{TABLES[place[2]]()}{place[3]}", text)


def main() -> int:
    """Write, or compare, every page.

    Returns:
        1 if a page was to be compared and is out of date.
    """
    stale = []
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if generate(text) == text:
            continue
        stale.append(page.name)
        if "--check" not in sys.argv:
            page.write_text(generate(text), encoding="utf-8")
    print(f"out of date: {', '.join(stale)}" if stale else "all tables are up to date")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
