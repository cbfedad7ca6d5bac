"""What an arm divides its loss by: samestep's way, and two wrong ones kept here to be measured.

The wrong ones are written in samestep's own algebra, so that everything else about the arms is
the same code. Nothing outside of the study can choose them.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from samestep.engine.counts import count_units
from samestep.engine.terms import Counter, LossFn, Term, constant
from samestep.study.spec import Normalisation

COUNTERS: dict[str, Counter] = {"micro-batch": lambda _: 1}
"""Counts the unit that the mean of means divides by."""

EXPLANATIONS: dict[Normalisation, str] = {
    "exact": "the sum over all targets of the batch, divided once by their number",
    "mean-of-means": "WRONG: each micro-batch is divided by its own targets, then averaged, so a "
    "target weighs more the fewer its micro-batch has",
    "sum": 'WRONG: reduction="sum", never divided, so the gradient grows with the number of '
    "targets in the batch",
}


def apply_normalisation(loss_fn: LossFn, normalisation: Normalisation) -> LossFn:
    """The loss that an arm optimises, with the exact token loss ("nll") as a metric beside it.

    Args:
        loss_fn: A loss of named terms with "nll" in tokens among them, as `samestep.CausalLMLoss`.
        normalisation: What to divide by.

    Returns:
        The loss; to be run with `COUNTERS`.
    """
    if normalisation == "exact":
        return loss_fn

    def wrong_loss(model: nn.Module, micro_batch: Any) -> dict[str, Term]:
        terms = loss_fn(model, micro_batch)
        assert isinstance(terms, Mapping)
        nll = terms["nll"]
        assert isinstance(nll, Term)
        total = nll.total
        metric = Term(total.detach(), weight=0.0)
        if normalisation == "sum":
            return {"sum (wrong)": Term(total, constant(1)), "nll": metric}
        # Frameworks divide 0 by 0 where a micro-batch has no target; this is kinder to them.
        mean = total / max(1.0, count_units([micro_batch])["token"])
        return {"mean of means (wrong)": Term(mean, "micro-batch"), "nll": metric}

    return wrong_loss
