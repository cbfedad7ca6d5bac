"""What a run optimises: a loss, and how its units are counted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from samestep.terms import Counter, LossFn


@dataclass(frozen=True)
class Objective:
    """A loss with the counters of its units.

    Attributes:
        loss_fn: (model, micro-batch) to terms; wrapped by `samestep.TwoPass` if it couples.
        counters: A counter for each unit that is not counted by default.
        annotate: Run once on every micro-batch of the data before the first step, without a
            graph: (model, micro-batch) to further fields of its records, each [records, ...];
            such as what a reference model says. None: nothing is added.
        after_step: Run on every rank after each step of training: (model, whether the weights
            moved). None: nothing is run.
    """

    loss_fn: LossFn
    counters: Mapping[str, Counter] = field(default_factory=dict)
    annotate: Callable[[Any, Mapping[str, Any]], dict[str, Tensor]] | None = None
    after_step: Callable[[Any, bool], None] | None = None
