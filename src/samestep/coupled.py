"""Terms that are no sum over examples: what they are made of."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from samestep.errors import ConfigError


@dataclass(frozen=True)
class Coupled:
    """A term in which the examples of the effective batch meet: value(s) of a statistic s.

    Load balance over experts, in-batch negatives, a KL over the batch: computed on a part of
    the batch they are another function. So each micro-batch gives its part of the statistic;
    the step gathers s over the whole effective batch first, and value(s) is the term.

    Attributes:
        part: This micro-batch's part of s, with a graph: for "sum" of the same shape in every
            micro-batch, for "rows" [rows, ...] with any number of rows.
        value: Maps the whole s (float64, detached from the model) to the term: 0-d, already what
            is to be optimised. It must be the same function in every micro-batch, and for "rows"
            not depend on their order.
        gather: The whole s is the "sum" of the parts, or their "rows" one below another.
        weight: Its weight in the objective. 0 makes it a metric.

    Raises:
        ConfigError: The part, the gathering or the weight is of the wrong kind.
    """

    part: Tensor
    value: Callable[[Tensor], Tensor]
    gather: Literal["sum", "rows"] = "sum"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.part, Tensor) or not self.part.is_floating_point():
            raise ConfigError("a Coupled's part must be a tensor of floating-point numbers")
        if self.gather not in ("sum", "rows"):
            raise ConfigError(f"a Coupled gathers by 'sum' or 'rows', not {self.gather!r}")
        if self.gather == "rows" and self.part.dim() == 0:
            raise ConfigError("a Coupled that gathers rows needs a part of [rows, ...], not 0-d")
        if not math.isfinite(self.weight):
            raise ConfigError(f"a Coupled's weight must be finite, not {self.weight!r}")
