"""docs/audit.md is made of the results, with what `samestep.hf.exact` makes of each fault."""

import importlib.util
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def tables() -> Any:
    spec = importlib.util.spec_from_file_location(
        "tables", ROOT / "benchmarks" / "audit" / "tables.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_of_the_results() -> None:
    made = tables()
    subjects, heads = (json.loads(path.read_text()) for path in (made.SUBJECTS, made.HEADS))
    assert made.page(subjects, heads) == made.PAGE.read_text(encoding="utf-8")
    lines = made.page(subjects, heads).splitlines()
    row = next(line for line in lines if "| BertForMaskedLM" in line)
    assert row.split(" | ")[-2] == "exact"


def test_each_way_to_be_cured_has_its_words() -> None:
    cured = tables()._cured
    assert cured({}) == cured({"with exact": None}) == ""
    assert cured({"with exact": {"verdict": "exact", "left": []}}) == "exact"
    assert cured({"with exact": {"verdict": "refused", "why": "two units"}}) == "refused"
    left = {"verdict": "inexact", "left": ["ranks", "reported"]}
    assert cured({"with exact": left}) == "inexact: ranks, reported"
    proved = {**left, "left": ["micro-batch"], "options": {}, "prove": "attends to padding"}
    assert cured({"with exact": proved}) == "inexact: micro-batch, refused with `prove=True`"
    refused = {"verdict": "exact", "left": [], "refused": ["ranks"]}
    assert cured({"with exact": refused}) == "exact; refused: ranks"
    two_pass = {"verdict": "exact", "left": [], "options": {"two_pass": True}}
    assert cured({"with exact": two_pass}) == "exact, with `two_pass=True`"
