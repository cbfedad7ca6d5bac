"""Inputs of every kind, spoiled at random: taken, or refused by an error of samestep's own.

`benchmarks/fuzz.py` tries 50,000 of the same; here hypothesis draws some, and names the seed.
"""

import importlib
import json
import logging
import random
from pathlib import Path

import pytest
from fuzzing import KINDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NUMBER = {"settings": 150, "YAML": 60, "rows": 250, "images": 150, "latents": 100}
"""How many of a kind; 60 of the others."""


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_is_taken_or_refused(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, logger="samestep")  # what it says of each would fill the log

    @settings(
        max_examples=NUMBER.get(kind, 60),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(draw=st.randoms(use_true_random=True))
    def outcome(draw: random.Random) -> None:
        assert KINDS[kind](tmp_path, draw) in (True, False)

    outcome()


def test_the_page_has_the_table_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    fuzz = importlib.import_module("fuzz")
    kinds = json.loads((root / "benchmarks/results/fuzz.json").read_text(encoding="utf-8"))["kinds"]
    assert kinds.keys() == KINDS.keys()
    assert not any(row["faults"] for row in kinds.values())
    assert (root / "docs/faults.md").read_text(encoding="utf-8").endswith(fuzz.part(kinds))
