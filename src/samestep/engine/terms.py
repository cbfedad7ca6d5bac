"""What a loss returns: named sums with a unit, and terms that couple the batch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from samestep.errors import ConfigError, StepError


@dataclass(frozen=True)
class Constant:
    """A unit that counts the same in every batch: the divisor is ``value`` itself."""

    value: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value > 0):
            raise ConfigError(f"constant({self.value}): the divisor must be finite and above 0")


Unit: TypeAlias = str | Constant
"""What a term is summed over: "token", "sequence", "pair", "example", a name of your own, or
`constant`."""

Counts: TypeAlias = dict[str, float]
"""How many of each unit the whole effective batch holds."""

MicroBatch: TypeAlias = Any
"""A micro-batch: whatever the loss takes. A mapping with ``labels`` is counted by default."""

Counter: TypeAlias = Callable[[MicroBatch], float]
"""Counts one unit in a micro-batch, from the data alone."""


def constant(value: float) -> Constant:
    """The unit of a term that is divided by a fixed number, as in Dr. GRPO's constant length.

    Args:
        value: The divisor; finite and above 0.

    Returns:
        A unit for `Term` and for ``normalize``.

    Raises:
        ConfigError: The divisor is not finite or not above 0.

    Example:
        >>> import torch, samestep
        >>> samestep.constant(1024)
        Constant(value=1024.0)
        >>> term = samestep.Term(torch.tensor(512.0), unit=samestep.constant(1024))
        >>> samestep.evaluate(torch.nn.Linear(1, 1), [None], lambda model, _: term).loss
        0.5
    """
    return Constant(float(value))


@dataclass(frozen=True)
class Term:
    """One named part of a loss: a sum, what it is a sum over, and its weight.

    Attributes:
        total: The sum over this micro-batch: 0-d, or [sequences] with one sum for each
            sequence in reading order (then the step applies ``example_weights`` and can
            normalise by sequence). Never divided by anything.
        unit: What it is a sum over.
        weight: Its weight in the objective. 0 makes it a metric: reported, not optimised.

    Raises:
        ConfigError: The total, the unit or the weight is of the wrong kind.

    Example:
        A loss over pairs, with a metric beside it:

        >>> import torch, samestep
        >>> def loss_fn(model, micro_batch):
        ...     margin = model(micro_batch["chosen"]) - model(micro_batch["rejected"])
        ...     losses = torch.nn.functional.softplus(-margin)
        ...     return {
        ...         "logistic": samestep.Term(losses.sum(), "pair"),
        ...         "accuracy": samestep.Term((margin > 0).sum(), "pair", weight=0.0),
        ...     }
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> torch.nn.init.ones_(model.weight).requires_grad
        True
        >>> pairs = {"chosen": torch.ones(3, 2), "rejected": torch.zeros(3, 2)}
        >>> counters = {"pair": lambda micro_batch: len(micro_batch["chosen"])}
        >>> report = samestep.evaluate(model, [pairs], loss_fn, counters=counters)
        >>> {name: round(value, 4) for name, value in report.terms.items()}
        {'logistic': 0.1269, 'accuracy': 1.0}
    """

    total: Tensor
    unit: Unit = "token"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.total, Tensor) or self.total.dim() > 1:
            value = tuple(self.total.shape) if isinstance(self.total, Tensor) else self.total
            raise ConfigError(
                f"a Term's total must be a tensor, 0-d or [sequences]; this one is {value!r}"
            )
        if not isinstance(self.unit, str | Constant):
            raise ConfigError(f"a Term's unit is a name or constant(k), not {self.unit!r}")
        if not math.isfinite(self.weight):
            raise ConfigError(f"a Term's weight must be finite, not {self.weight!r}")


@dataclass(frozen=True)
class Coupled:
    """A term that is no sum over examples: value(s) of a statistic s of the whole batch.

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

    Example:
        The spread of a model's outputs over the batch, the same under every split:

        >>> import torch, samestep
        >>> def spread(outputs):
        ...     return outputs.std()
        >>> def loss_fn(model, micro_batch):
        ...     return samestep.Coupled(model(micro_batch), spread, gather="rows")
        >>> model = torch.nn.Linear(1, 1)
        >>> batch = torch.arange(6.0)[:, None]
        >>> losses = [
        ...     samestep.evaluate(model, batch.split(size), loss_fn).loss for size in (6, 4, 1)
        ... ]
        >>> max(losses) - min(losses) < 1e-6
        True
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


LossResult: TypeAlias = Term | Coupled | Mapping[str, Term] | Mapping[str, Term | Coupled]
"""What a loss returns for one micro-batch: one term, or several by name."""

LossFn: TypeAlias = Callable[[nn.Module, MicroBatch], LossResult]
"""A loss: (model, micro-batch) to sums over that micro-batch."""


def named_terms(loss: LossResult) -> Mapping[str, Term | Coupled]:
    """What a loss returned, by name.

    Args:
        loss: What it returned.

    Returns:
        The terms; a single one is called "loss".

    Raises:
        StepError: It is neither a term nor terms by name.
    """
    if isinstance(loss, Term | Coupled):
        return {"loss": loss}
    if not isinstance(loss, Mapping) or not loss:
        found = "an empty mapping" if isinstance(loss, Mapping) else type(loss).__name__
        why = {
            "NoneType": "Does it lack a return?",
            "float": "A number has no graph and no unit: nothing could learn from it",
        }.get(found, "A bare tensor has no unit, so it cannot be normalised")
        raise StepError(
            f"the loss returned {found}: return a Term(total, unit) or {{name: Term}}. {why}"
        )
    return loss


def term_tensors(loss: LossResult) -> dict[str, Tensor]:
    """The tensors that a loss returned, by name: totals, and parts of coupled terms.

    Args:
        loss: What it returned.

    Returns:
        One tensor for each term, without its unit.

    Raises:
        StepError: As for `named_terms`.
    """
    return {
        name: term.total if isinstance(term, Term) else term.part
        for name, term in named_terms(loss).items()
    }


@dataclass(frozen=True)
class Objective:
    """A loss with the counters of its units, and what runs around its steps.

    Attributes:
        loss_fn: (model, micro-batch) to terms; wrapped by `samestep.TwoPass` if it couples.
        counters: A counter for each unit that is not counted by default.
        annotate: Run once on every micro-batch of the data before the first step, without a
            graph: (model, micro-batch) to further fields of its records, each [records, ...];
            such as the log probabilities of a reference model. None: nothing is added.
        after_step: Run on every rank after each step of training: (model, whether the weights
            moved). None: nothing is run.
        state: Tensors by name that ``after_step`` changes in place and a resumed run needs;
            checkpoints hold them, the same on every rank.

    Example:
        An objective of your own, as `samestep train` takes one:

        >>> import torch, samestep
        >>> def loss_fn(model, micro_batch):
        ...     return samestep.Term(model(micro_batch["x"]).square().sum(), unit="row")
        >>> objective = samestep.Objective(loss_fn, counters={"row": lambda mb: len(mb["x"])})
        >>> report = samestep.evaluate(
        ...     torch.nn.Identity(),
        ...     [{"x": torch.tensor([[1.0], [3.0]])}],
        ...     objective.loss_fn,
        ...     counters=objective.counters,
        ... )
        >>> report.loss, report.counts
        (5.0, {'row': 2.0})
    """

    loss_fn: LossFn
    counters: Mapping[str, Counter] = field(default_factory=dict)
    annotate: Callable[[Any, Mapping[str, Any]], dict[str, Tensor]] | None = None
    after_step: Callable[[Any, bool], None] | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
