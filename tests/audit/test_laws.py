"""Each law predicts its own bug and no other, on a case that tells them apart."""

import pytest
import torch

from samestep.audit.laws import Case, laws
from samestep.audit.subject import Gradient
from samestep.audit.vectors import combine, compare

EXAMPLES, TARGETS, LABELS, PLACES = [2, 1, 3], [9, 14, 11], [11, 15, 14], [16, 15, 36]


def parts() -> list[Gradient]:
    draw = torch.Generator().manual_seed(0)
    return [{"w": torch.randn(50, generator=draw, dtype=torch.float64)} for _ in EXAMPLES]


def case(factors: list[float]) -> Case:
    alone = parts()
    counts = [
        {"labels": ("unshifted-count", float(n)), "elements": ("padding-counted", float(p))}
        for n, p in zip([*LABELS, sum(LABELS)], [*PLACES, 90], strict=True)
    ]
    return Case(
        split=combine(alone, factors),
        whole=combine(alone, [n / sum(TARGETS) for n in TARGETS]),
        alone=alone,
        examples=EXAMPLES,
        targets=TARGETS,
        counts=counts,
        close=1e-9,
    )


def shares(counts: list[int]) -> list[float]:
    return [one / sum(counts) for one in counts]


@pytest.mark.parametrize(
    ("factors", "cause"),
    [
        ([1 / 3] * 3, "mean-of-means"),
        ([1.0] * 3, "unscaled-sum"),
        (shares(EXAMPLES), "example-weighted"),
        (shares(LABELS), "unshifted-count"),
        (shares(PLACES), "padding-counted"),
        ([3 * n / sum(TARGETS) for n in TARGETS], "unscaled-sum"),
        ([n / sum(TARGETS) / 3 for n in TARGETS], "divided-twice"),
        ([n / sum(LABELS) for n in TARGETS], "unshifted-count"),
        ([n / sum(TARGETS) * 90 / sum(PLACES) for n in TARGETS], "padding-counted"),
        ([0, 0, 1.0], "last-micro-batch-only"),
        ([0, 0, TARGETS[2] / sum(TARGETS)], "last-micro-batch-only"),
        ([0.3, 0.1, 0.7], None),
    ],
)
def test_the_best_law_is_the_bug(factors: list[float], cause: str | None) -> None:
    observed = case(factors)
    scored = sorted(
        (compare(law.gradient, observed.split).relative_difference, law.cause)
        for law in laws(observed)
    )
    fitting = {name for residual, name in scored if residual < observed.close}
    assert fitting == (set() if cause is None else {cause})
