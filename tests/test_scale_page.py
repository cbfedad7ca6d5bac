"""The numbers of docs/scale.md are those of its formulas."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_tables_are_the_formulas() -> None:
    numbers = runpy.run_path(str(ROOT / "benchmarks" / "scale_numbers.py"))
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert numbers["table"]() in page
    assert numbers["activation_table"]() in page
