"""Two ranks give the gradient, the logged loss and the evaluation of one."""

from pathlib import Path
from typing import Any

import pytest
from exact_cases import BALANCED, EXACT, worst
from exact_rank_work import trained
from gloo import on_ranks


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("name", "labels"),
    [("BertForMaskedLM", "tokens"), ("BertForSequenceClassification", "row")],
)
@pytest.mark.parametrize("rows", [8, 7])
def test_two_ranks_are_one(tmp_path: Path, name: str, labels: str, rows: int) -> None:
    """With 7 rows a rank repeats one, to be as long as the other: it must not count twice."""
    gradient, loss, evaluated = trained(name, labels, (8, 1), str(tmp_path), rows=rows)
    for found in on_ranks(2, trained, name, labels, (2, 2), str(tmp_path), rows=rows):
        assert worst(gradient, found[0]) < EXACT
        assert found[1:] == pytest.approx((loss, evaluated), rel=1e-6)


def test_two_ranks_are_not_one_without_it(tmp_path: Path) -> None:
    case = ("BertForMaskedLM", "tokens")
    gradient, *_ = trained(*case, (8, 1), str(tmp_path))
    for found in on_ranks(2, trained, *case, (2, 2), str(tmp_path), apply=False):
        assert worst(gradient, found[0]) > 1e-2


def test_two_ranks_balance_their_routers_as_one(tmp_path: Path) -> None:
    case: Any = ("MixtralForCausalLM", "next")
    options = {"rows": 7, "config": BALANCED, "two_pass": True}
    gradient, loss, evaluated = trained(*case, (8, 1), str(tmp_path), **options)
    for found in on_ranks(2, trained, *case, (2, 2), str(tmp_path), **options):
        assert worst(gradient, found[0]) < EXACT
        assert found[1:] == pytest.approx((loss, evaluated), rel=1e-6)
