"""Counts the units of a batch, from its data alone: the denominators of the objective."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from samestep.engine.device_copy import data_of
from samestep.engine.exact_sum import exact_parts, rounded_sum
from samestep.engine.targets import (
    IGNORE,
    check_collated_positions,
    num_sequences,
    sequence_ids,
    shifted_weights,
)
from samestep.engine.terms import Constant, Counter, Counts, MicroBatch, Unit
from samestep.errors import ConfigError, StepError

CountParts: TypeAlias = dict[str, list[float]]
"""By unit, floats whose exact sum is how many there are: what ranks send to each other."""


def targets_per_sequence(micro_batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The number of targets and the weight of each sequence of a micro-batch.

    Args:
        micro_batch: As for `samestep.engine.targets.shifted_weights`; optionally
            ``example_weights`` [sequences].

    Returns:
        The number of targets [sequences], each counted by its token weight, and the weights
        [sequences], float64.

    Raises:
        ConfigError: ``example_weights`` has another length than the sequences.
    """
    ids = sequence_ids(micro_batch)
    target_counts = shifted_weights(micro_batch)
    sequences = num_sequences(micro_batch)
    targets = target_counts.new_zeros(sequences).index_add_(
        0, ids.flatten(), target_counts.flatten()
    )
    weights = micro_batch.get("example_weights")
    if weights is None:
        return targets, torch.ones_like(targets)
    if weights.shape != targets.shape:
        raise ConfigError(
            f"example_weights has shape {tuple(weights.shape)}, but the micro-batch holds "
            f"{sequences} sequences: give one weight a sequence"
        )
    return targets, weights.to(targets)


def weights_per_target(targets: Tensor, weights: Tensor) -> Tensor:
    """What each target of a sequence weighs where every sequence is to weigh the same.

    Args:
        targets: The number of targets of each sequence [sequences].
        weights: The weight of each sequence [sequences].

    Returns:
        [sequences]: the weight shared out among the sequence's targets.
    """
    return weights / targets.where(targets > 0, 1)


def target_weights(micro_batch: Mapping[str, Any], normalize: Unit) -> Tensor:
    """The weight of each target in a sum whose unit is ``normalize``.

    An example of weight 2 counts as if it stood twice in the batch. By "token" or
    `constant` each target carries its example's weight, times its token's; by "sequence" the
    example's is shared out among the targets of the sequence by their tokens'.

    Args:
        micro_batch: A mapping with ``labels`` [rows, length] (label i is token i itself);
            optionally ``position_ids``, ``attention_mask`` and ``token_weights`` [rows, length],
            and ``example_weights`` [sequences].
        normalize: "token", "sequence" or `constant`.

    Returns:
        Weights [rows, length], float64, 0 where there is no target.

    Raises:
        ConfigError: Another unit.

    Example:
        Position i predicts token i + 1, so a row of n labels has at most n - 1 targets:

        >>> import torch, samestep
        >>> batch = {"labels": torch.tensor([[5, 6, 7], [5, 6, -100]])}
        >>> samestep.target_weights(batch, "token").tolist()
        [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
        >>> samestep.target_weights(batch, "sequence").tolist()
        [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]
    """
    targets, weights = targets_per_sequence(micro_batch)
    if normalize == "sequence":
        weights = weights_per_target(targets, weights)
    elif normalize != "token" and not isinstance(normalize, Constant):
        raise ConfigError(
            f"normalize={normalize!r}: targets can be normalised by 'token', 'sequence' or "
            "constant(k)"
        )
    return weights[sequence_ids(micro_batch)] * shifted_weights(micro_batch)


def count_labels(micro_batch: Mapping[str, Any]) -> Counts:
    """The units that a mapping with ``labels`` holds, without any counter.

    An example of weight w counts w times, in every unit.

    Args:
        micro_batch: With labels [rows, length], as for `targets_per_sequence`: counts "token"
            (targets after the shift), and "sequence" and "example" (sequences with at least
            one target). With labels [rows] (classes or values): counts "example", the rows
            whose label is not ``IGNORE``.

    Returns:
        The counts by unit.

    Raises:
        StepError: ``target_positions`` or ``spans`` do not fit the labels.
    """
    labels: Tensor = micro_batch["labels"]
    if labels.dim() == 1:
        weights = micro_batch.get("example_weights", torch.ones_like(labels, dtype=torch.float64))
        return {"example": float((weights * (labels != IGNORE)).double().sum())}
    check_collated_positions(micro_batch)
    targets, weights = targets_per_sequence(micro_batch)
    sums = torch.stack([(targets * weights).sum(), (weights * (targets > 0)).sum()])
    tokens, sequences = sums.tolist()  # both in one read: a GPU is waited for once
    return {"token": tokens, "sequence": sequences, "example": sequences}


def count_units(
    micro_batches: Iterable[MicroBatch], counters: Mapping[str, Counter] | None = None
) -> Counts:
    """Count every unit over micro-batches, as `count_parts` does, and add up.

    Args:
        micro_batches: As for `count_parts`.
        counters: As for `count_parts`.

    Returns:
        The counts by unit.

    Raises:
        StepError: As for `count_parts`.
    """
    return add_counts([count_parts(micro_batches, counters)])


def count_parts(
    micro_batches: Iterable[MicroBatch], counters: Mapping[str, Counter] | None = None
) -> CountParts:
    """Count every unit over micro-batches that are a part of an effective batch.

    Args:
        micro_batches: All of them; those that are mappings with ``labels`` are counted by
            `count_labels`. Of one that was copied to a device the data on the CPU are counted
            (`samestep.engine.device_copy`), which counters then get too.
        counters: A counter for each further unit, or to replace a default one.

    Returns:
        By unit floats whose exact sum is the count, for `add_counts`.

    Raises:
        StepError: A counter gave something that is not a finite number of at least 0, or as for
            `count_labels`; labels are no tensor, or some micro-batches have none.
    """
    counters = counters or {}
    found: dict[str, list[float]] = {unit: [] for unit in counters}
    labelled: list[bool] = []
    for index, micro_batch in enumerate(map(data_of, micro_batches)):
        labelled.append(isinstance(micro_batch, Mapping) and "labels" in micro_batch)
        if labelled[-1] is not labelled[0]:
            raise StepError(
                f"micro-batch {index} has {'' if labelled[-1] else 'no '}'labels', unlike those "
                "before it: its targets would be counted otherwise. Give all of them labels (-100 "
                "where there is no target), or none and counters for every unit"
            )
        counts = _count_labels_of(micro_batch, index) if labelled[-1] else {}
        counts.update({unit: float(counter(micro_batch)) for unit, counter in counters.items()})
        for unit, count in counts.items():
            if not (math.isfinite(count) and count >= 0):
                raise StepError(
                    f"the counter of unit {unit!r} gave {count} for micro-batch {index}: "
                    "a count is a finite number of at least 0"
                )
            found.setdefault(unit, []).append(count)
    return {unit: exact_parts(each) for unit, each in found.items()}


def _count_labels_of(micro_batch: Mapping[str, Any], index: int) -> Counts:
    labels = micro_batch["labels"]
    if not isinstance(labels, Tensor) or labels.dim() == 0:
        found = "a 0-d tensor" if isinstance(labels, Tensor) else type(labels).__name__
        raise StepError(
            f"the 'labels' of micro-batch {index} are {found}: they must be a tensor [rows, "
            "length] of token ids or [rows] of classes, -100 where there is no target"
        )
    return count_labels(micro_batch)


@contextmanager
def uncounted_guard(micro_batch: MicroBatch, counts: Mapping[str, Any]) -> Iterator[None]:
    """Say that nothing was counted where a loss cannot read such a micro-batch either.

    Args:
        micro_batch: What the loss is run on inside the block.
        counts: The counts of the batch.

    Raises:
        StepError: Nothing was counted, and the loss failed to read the micro-batch.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        if counts:
            raise
        found = f"a {type(micro_batch).__name__}"
        if isinstance(micro_batch, Mapping):
            found = f"a mapping of {', '.join(map(repr, micro_batch)) or 'nothing'}"
        raise StepError(
            f"nothing was counted in this batch, and the loss failed ({type(error).__name__}: "
            f"{error}) on a micro-batch that is {found}. Put 'labels' into each micro-batch "
            "([rows, length] of token ids or [rows] of classes, -100 where there is no target), or "
            "pass counters={unit: function of a micro-batch} and a loss that reads what there is"
        ) from error


def join_counts(parts: Iterable[CountParts]) -> CountParts:
    """The parts of what several parts of a batch hold together.

    Args:
        parts: `count_parts` of each; a unit may be missing in some of them.

    Returns:
        Of all of them, by unit.
    """
    found: dict[str, list[float]] = {}
    for part in parts:
        for unit, each in part.items():
            found.setdefault(unit, []).extend(each)
    return {unit: exact_parts(each) for unit, each in found.items()}


def add_counts(parts: Iterable[CountParts]) -> Counts:
    """The counts of a batch from those of its parts, rounded once: the same for any parts.

    Args:
        parts: As for `join_counts`.

    Returns:
        Their sum by unit.
    """
    return {unit: rounded_sum(each) for unit, each in join_counts(parts).items()}


def input_tokens(micro_batch: MicroBatch) -> int:
    """The input tokens of a micro-batch.

    Args:
        micro_batch: Any; ``input_ids`` and ``attention_mask`` are read where it has them.

    Returns:
        Their number without padding; 0 without ``input_ids``.
    """
    data = data_of(micro_batch)
    if not isinstance(data, Mapping) or "input_ids" not in data:
        return 0
    mask = data.get("attention_mask")
    return int(data["input_ids"].numel() if mask is None else mask.sum())
