"""The algebra of a loss: terms, units, counts.

A loss is a set of named terms. A term is a sum over the things it is measured in (its
unit) and never divides; the step counts each unit over the whole effective batch and
divides once:

    objective = sum over terms of  weight * total / count(unit)

Because totals and counts add up over any partition of the batch, the objective and its
gradient cannot depend on the partition.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from samestep.coupled import Coupled
from samestep.errors import ConfigError, StepError
from samestep.targets import (
    IGNORE,
    check_known,
    number_of_sequences,
    sequence_ids,
    shifted_weights,
)


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

Micro: TypeAlias = Any
"""A micro-batch: whatever the loss takes. A mapping with ``labels`` is counted by default."""

Counter: TypeAlias = Callable[[Micro], float]
"""Counts one unit in a micro-batch, from the data alone."""


def constant(value: float) -> Constant:
    """The unit of a term that is divided by a fixed number, as in Dr. GRPO's constant length.

    Args:
        value: The divisor; finite and above 0.

    Returns:
        A unit for `Term` and for ``normalize``.

    Raises:
        ConfigError: The divisor is not finite or not above 0.
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
    """

    total: Tensor
    unit: Unit = "token"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.total, Tensor) or self.total.dim() > 1:
            found = tuple(self.total.shape) if isinstance(self.total, Tensor) else self.total
            raise ConfigError(
                f"a Term's total must be a tensor, 0-d or [sequences]; this one is {found!r}"
            )
        if not isinstance(self.unit, str | Constant):
            raise ConfigError(f"a Term's unit is a name or constant(k), not {self.unit!r}")
        if not math.isfinite(self.weight):
            raise ConfigError(f"a Term's weight must be finite, not {self.weight!r}")


LossResult: TypeAlias = Term | Coupled | Mapping[str, Term] | Mapping[str, Term | Coupled]
"""What a loss gives for one micro-batch: one term, or several by name."""

LossFn: TypeAlias = Callable[[nn.Module, Micro], LossResult]
"""A loss: sums over one micro-batch."""


@dataclass(frozen=True)
class Sum:
    """A term reduced to one number of one unit: what the step divides and adds up."""

    total: Tensor
    unit: Unit
    weight: float


def sequence_targets(micro: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Targets and weight of each sequence of a micro-batch.

    Args:
        micro: As for `samestep.targets.shifted_weights`; optionally ``example_weights``
            [sequences].

    Returns:
        The number of targets [sequences], each counted by its token weight, and the weights
        [sequences], float64.

    Raises:
        ConfigError: ``example_weights`` has another length than the sequences.
    """
    ids = sequence_ids(micro)
    is_target = shifted_weights(micro)
    sequences = number_of_sequences(micro)
    targets = is_target.new_zeros(sequences).index_add_(0, ids.flatten(), is_target.flatten())
    weights = micro.get("example_weights")
    if weights is None:
        return targets, torch.ones_like(targets)
    if weights.shape != targets.shape:
        raise ConfigError(
            f"example_weights has shape {tuple(weights.shape)}, but the micro-batch holds "
            f"{sequences} sequences: give one weight a sequence"
        )
    return targets, weights.to(targets)


def target_weights(micro: Mapping[str, Any], normalize: Unit) -> Tensor:
    """The weight of each target in a sum whose unit is ``normalize``.

    An example of weight 2 counts as if it stood twice in the batch. By "token" or
    `constant` each target carries its example's weight, times its token's; by "sequence" the
    example's is shared out among the targets of the sequence by their tokens'.

    Args:
        micro: As for `sequence_targets`.
        normalize: "token", "sequence" or `constant`.

    Returns:
        Weights [rows, length], float64, 0 where there is no target.

    Raises:
        ConfigError: Another unit.
    """
    targets, weights = sequence_targets(micro)
    if normalize == "sequence":
        weights = weights / targets.where(targets > 0, 1)
    elif normalize != "token" and not isinstance(normalize, Constant):
        raise ConfigError(
            f"normalize={normalize!r}: targets can be normalised by 'token', 'sequence' or "
            "constant(k)"
        )
    return weights[sequence_ids(micro)] * shifted_weights(micro)


def count_labels(micro: Mapping[str, Any]) -> Counts:
    """The counts that a mapping with ``labels`` gives by itself.

    An example of weight w counts w times, in every unit.

    Args:
        micro: With labels [rows, length], as for `sequence_targets`: counts "token"
            (targets after the shift), and "sequence" and "example" (sequences with at least
            one target). With labels [rows] (classes or values): counts "example", the rows
            whose label is not ``IGNORE``.

    Returns:
        The counts by unit.

    Raises:
        StepError: What the micro-batch says of its layout does not fit its labels.
    """
    labels: Tensor = micro["labels"]
    if labels.dim() == 1:
        weights = micro.get("example_weights", torch.ones_like(labels, dtype=torch.float64))
        return {"example": float((weights * (labels != IGNORE)).double().sum())}
    check_known(micro)
    targets, weights = sequence_targets(micro)
    sums = torch.stack([(targets * weights).sum(), (weights * (targets > 0)).sum()])
    tokens, sequences = sums.tolist()  # read back at once
    return {
        "token": tokens,
        "sequence": sequences,
        "example": sequences,
    }


def count(micro_batches: Iterable[Micro], counters: Mapping[str, Counter] | None = None) -> Counts:
    """Count every unit over the micro-batches of one effective batch.

    Args:
        micro_batches: All of them; those that are mappings with ``labels`` are counted by
            `count_labels`.
        counters: A counter for each further unit, or to replace a default one.

    Returns:
        The counts by unit, added up.

    Raises:
        StepError: A counter gave something that is not a finite number of at least 0, or as for
            `count_labels`.
    """
    counters = counters or {}
    counts: Counts = dict.fromkeys(counters, 0.0)
    for index, micro in enumerate(micro_batches):
        found = count_labels(micro) if isinstance(micro, Mapping) and "labels" in micro else {}
        found.update({unit: float(counter(micro)) for unit, counter in counters.items()})
        for unit, number in found.items():
            if not (math.isfinite(number) and number >= 0):
                raise StepError(
                    f"the counter of unit {unit!r} gave {number} for micro-batch {index}: "
                    "a count is a finite number of at least 0"
                )
            counts[unit] = counts.get(unit, 0.0) + number
    return counts


def add_counts(parts: Iterable[Counts]) -> Counts:
    """Counts of parts of a batch, added up; a unit may be missing in some of them."""
    total: Counts = {}
    for part in parts:
        for unit, number in part.items():
            total[unit] = total.get(unit, 0.0) + number
    return total


def divisor(name: str, unit: Unit, counts: Counts) -> float:
    """The number that a term of this unit is divided by.

    Args:
        name: The term's name, for the error.
        unit: The term's unit.
        counts: What was counted.

    Returns:
        The count; 0 if the batch holds none of the unit.

    Raises:
        StepError: Nobody counted the unit.
    """
    if isinstance(unit, Constant):
        return unit.value
    if unit not in counts:
        known = ", ".join(repr(known) for known in counts) or "nothing"
        raise StepError(
            f"term {name!r} is a sum over unit {unit!r}, which nobody counted (counted: {known}). "
            f"Pass counters={{{unit!r}: function of a micro-batch}}, or give micro-batches with "
            "'labels', whose 'token', 'sequence' and 'example' are counted by default"
        )
    return counts[unit]


def reduce_terms(loss: LossResult, micro: Micro, *, normalize: Unit) -> dict[str, Sum]:
    """What a loss returned, as one 0-d sum for each term (a single term is called "loss").

    Args:
        loss: The loss's result for this micro-batch.
        micro: The micro-batch.
        normalize: The unit that "token" terms are to be normalised by.

    Returns:
        The sums by name.

    Raises:
        StepError: The loss returned no terms, or the normalisation needs other totals.
    """
    return {name: _reduce(name, term, micro, normalize) for name, term in named_terms(loss).items()}


def named_terms(loss: LossResult) -> Mapping[str, Term | Coupled]:
    """What a loss returned, by name (a single term is called "loss").

    Raises:
        StepError: It is neither a term nor terms by name.
    """
    if isinstance(loss, Term | Coupled):
        return {"loss": loss}
    if not isinstance(loss, Mapping) or not loss:
        raise StepError(
            f"the loss returned {type(loss).__name__}: return a Term(total, unit) or "
            "{name: Term}. A bare tensor has no unit, so it cannot be normalised"
        )
    return loss


def _reduce(name: str, term: Any, micro: Micro, normalize: Unit) -> Sum:
    if isinstance(term, Coupled):
        raise StepError(
            f"term {name!r} couples the examples of the whole batch, so it needs a pass over all "
            "micro-batches first: declare it by passing samestep.TwoPass(loss_fn)"
        )
    if not isinstance(term, Term):
        raise StepError(f"term {name!r} of the loss is {type(term).__name__}, not a Term")
    unit = normalize if term.unit == "token" else term.unit
    if term.total.dim() == 0:
        if term.unit == "token" and unit == "sequence":
            raise StepError(
                f"term {name!r}: normalize='sequence' needs a total for each sequence, "
                "[sequences], but the total is one number. Return per-sequence sums, or weigh "
                "the targets by samestep.target_weights and give the unit 'sequence'"
            )
        return Sum(term.total, unit, term.weight)
    if micro.get("token_weights") is not None:
        raise StepError(
            f"term {name!r} has totals by sequence, but the micro-batch weighs tokens: weigh the "
            "targets by samestep.target_weights and return one number"
        )
    targets, weights = sequence_targets(micro)
    if term.total.shape != targets.shape:
        raise StepError(
            f"term {name!r} has {len(term.total)} totals for {len(targets)} sequences: "
            "return one total a sequence, in reading order, or one number"
        )
    if term.unit == "token" and unit == "sequence":
        weights = weights / targets.where(targets > 0, 1)
    return Sum((term.total * weights.to(term.total)).sum(), unit, term.weight)


def input_tokens(micro: Micro) -> int:
    """Input tokens of a micro-batch, without padding; 0 if it has no ``input_ids``."""
    if not isinstance(micro, Mapping) or "input_ids" not in micro:
        return 0
    mask = micro.get("attention_mask")
    return int(micro["input_ids"].numel() if mask is None else mask.sum())
