"""The axis of low precision: whether sums over micro-batches round."""

import torch

from samestep.audit.causes import advice
from samestep.audit.runs import Runs
from samestep.audit.vectors import compare, norm
from samestep.audit.verdict import AxisResult

COPIES = 64
"""Of one example, to add up: a power of two, so that a share of the batch has the same digits."""

GROWTH = 1.5
"""How much the error may grow with the copies: not at all where sums are wide, since all copies
have the same error; in bfloat16 each addition rounds anew."""


def low_precision(runs: Runs) -> AxisResult:
    """Whether rounding grows with the number of micro-batches, in bfloat16 weights.

    Copies of one example have one gradient, with one error; only adding them up can enlarge it.
    """
    example = max(range(runs.subject.size), key=lambda at: norm(runs.run(((at,),)).gradient))
    one, many = ((example,),), ((example,),) * COPIES
    errors = [
        compare(runs.again(cut, dtype=torch.bfloat16).gradient, runs.again(cut).gradient)
        for cut in (one, many)
    ]
    growth = errors[1].relative_difference / errors[0].relative_difference
    exact = growth <= GROWTH
    return AxisResult(
        name="low-precision",
        verdict="exact" if exact else "inexact",
        reason=f"error of bfloat16 against float64, 1 micro-batch and {COPIES} copies of it",
        ratio=errors[1].ratio,
        cosine=errors[1].cosine,
        relative_difference=errors[1].relative_difference,
        noise_floor=errors[0].relative_difference,
        worst=() if exact else errors[1].worst,
        cause=None if exact else "accumulation-dtype",
        residual=None if exact else 0.0,
        evidence=f"the error grows x {growth:.3g} from 1 to {COPIES} micro-batches",
        advice="" if exact else advice("accumulation-dtype"),
    )
