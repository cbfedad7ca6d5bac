"""Each law predicts its own bug and no other, on a case that tells them apart."""

import pytest
import torch

from samestep.audit.gradients import linear_combination, relative_difference
from samestep.audit.hypotheses import SplitEvidence, hypotheses
from samestep.audit.subject import Denominator, Gradient

EXAMPLES, TARGETS, LABELS, PLACES = [2, 1, 3], [9, 14, 11], [11, 15, 14], [16, 15, 36]


def parts() -> list[Gradient]:
    draw = torch.Generator().manual_seed(0)
    return [{"w": torch.randn(50, generator=draw, dtype=torch.float64)} for _ in EXAMPLES]


def case(factors: list[float]) -> SplitEvidence:
    alone = parts()
    counts = [
        {
            "labels": Denominator("unshifted-count", float(n)),
            "elements": Denominator("padding-counted", float(p)),
        }
        for n, p in zip([*LABELS, sum(LABELS)], [*PLACES, 90], strict=True)
    ]
    return SplitEvidence(
        split=linear_combination(alone, factors),
        whole=linear_combination(alone, [n / sum(TARGETS) for n in TARGETS]),
        alone=alone,
        examples=EXAMPLES,
        targets=TARGETS,
        denominators=counts,
        residual_tolerance=1e-9,
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
        (relative_difference(hypothesis.gradient, observed.split), hypothesis.cause)
        for hypothesis in hypotheses(observed)
    )
    fitting = {name for residual, name in scored if residual < observed.residual_tolerance}
    assert fitting == (set() if cause is None else {cause})
