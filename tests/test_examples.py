"""The examples run, and show what they claim."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_own_loop_learns_the_same_under_every_split() -> None:
    module = runpy.run_path(str(EXAMPLES / "own_loop.py"))
    whole, split = module["train"](32, steps=5), module["train"](1, steps=5)
    assert whole[-1] < whole[0]
    assert split == pytest.approx(whole, rel=1e-5)
