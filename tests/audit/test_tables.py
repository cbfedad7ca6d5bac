"""The tables of the pages are those of the code."""

import runpy
from pathlib import Path

import pytest

from samestep.audit.axes.table import AXES
from samestep.audit.causes import CAUSES

DOCS = Path(__file__).parents[2] / "docs"
SCRIPT = runpy.run_path(str(DOCS / "generate_tables.py"))


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_tables_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert SCRIPT["generate"](text) == text, "python docs/generate_tables.py"


def test_a_page_shows_every_axis_and_every_cause() -> None:
    text = (DOCS / "check.md").read_text(encoding="utf-8")
    assert not [name for name in (*AXES, *CAUSES) if f"| `{name}` |" not in text]


def test_a_table_that_is_out_of_date_is_seen() -> None:
    stale = "<!-- table: axes -->\n| `mine` |\n<!-- end of table -->\n"
    assert SCRIPT["generate"](stale) != stale
    assert "`mine`" not in SCRIPT["generate"](stale)
