"""The models of docs/models.md: no cut and no rank changes the step."""

from pathlib import Path

import pytest
import torch
from measure import mean_of_means, over_cuts, over_ranks
from named import NAMED, Named

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
EACH = pytest.mark.parametrize("named", NAMED, ids=lambda named: named.title)


@EACH
def test_cuts(named: Named) -> None:
    assert over_cuts(named, torch.float32) < 2e-6
    assert over_cuts(named, torch.float64) < (1e-7 if named.in_float32 else 1e-12)


@EACH
def test_two_ranks(named: Named) -> None:
    assert over_ranks(NAMED.index(named), torch.float32) < 2e-6


@EACH
def test_a_mean_of_means_would_be_seen(named: Named) -> None:
    assert mean_of_means(named) > 0.1


@EACH
def test_it_stands_on_the_page(named: Named) -> None:
    assert f"| {named.title} |" in PAGE.read_text(encoding="utf-8")
