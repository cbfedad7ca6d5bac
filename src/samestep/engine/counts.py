"""TODO: samestep.engine.counts."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from samestep.engine.targets import (
    IGNORE,
    check_known,
    number_of_sequences,
    sequence_ids,
    shifted_weights,
)
from samestep.engine.terms import Constant, Counter, Counts, MicroBatch, Unit
from samestep.errors import ConfigError, StepError


def sequence_targets(micro: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Targets and weight of each sequence of a micro-batch.

    Args:
        micro: As for `samestep.engine.targets.shifted_weights`; optionally ``example_weights``
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


def count_units(
    micro_batches: Iterable[MicroBatch], counters: Mapping[str, Counter] | None = None
) -> Counts:
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


def input_tokens(micro: MicroBatch) -> int:
    """Input tokens of a micro-batch, without padding; 0 if it has no ``input_ids``."""
    if not isinstance(micro, Mapping) or "input_ids" not in micro:
        return 0
    mask = micro.get("attention_mask")
    return int(micro["input_ids"].numel() if mask is None else mask.sum())
