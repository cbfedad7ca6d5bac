"""What several losses read from a micro-batch beside the model's inputs: weights and their counts.

A unit's counter adds up the same weights that the loss multiplies by, so an example of weight w
counts as if it stood w times in the batch.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from samestep.engine.counts import target_weights, targets_per_sequence
from samestep.engine.targets import IGNORE, sequence_ids, target_positions
from samestep.engine.terms import Counter, Unit


def example_weights(micro_batch: Mapping[str, Any]) -> Tensor:
    """The weight of each sequence.

    Args:
        micro_batch: A micro-batch of `samestep.data.collate.collate_examples`.

    Returns:
        [sequences], float64; 1 without ``example_weights``.
    """
    weights: Tensor | None = micro_batch.get("example_weights")
    if weights is None:
        sequences, device = len(micro_batch["example_ids"]), micro_batch["input_ids"].device
        return torch.ones(sequences, dtype=torch.float64, device=device)
    return weights


def pair_weights(micro_batch: Mapping[str, Any]) -> Tensor:
    """The weight of each pair, that of its chosen sequence.

    Args:
        micro_batch: Of pairs, the chosen and the rejected sequence of each side by side.

    Returns:
        [pairs], float64.
    """
    return example_weights(micro_batch)[::2]


def labelled_token_weights(micro_batch: Mapping[str, Any]) -> Tensor:
    """The weight of each labelled token: its example's.

    Args:
        micro_batch: With the field ``classes`` [rows, length], int64; ``IGNORE`` without a class.

    Returns:
        [rows, length], float64; 0 where there is no class.
    """
    labelled: Tensor = micro_batch["fields"]["classes"] != IGNORE
    return example_weights(micro_batch)[sequence_ids(micro_batch)] * labelled


def weights_at_targets(micro_batch: Mapping[str, Any], normalize: Unit) -> Tensor:
    """The weight of each target, as of `samestep.target_weights`, without the other positions.

    Args:
        micro_batch: With ``labels`` [rows, length].
        normalize: "token", "sequence" or `samestep.constant`.

    Returns:
        [targets], float64, in reading order.
    """
    return target_weights(micro_batch, normalize).flatten()[target_positions(micro_batch)]


def field_at_targets(micro_batch: Mapping[str, Any], name: str) -> Tensor:
    """What a field says of each target.

    Args:
        micro_batch: With ``labels`` [rows, length].
        name: Of a field [rows, length, ...], whose values stand at the tokens that they belong to.

    Returns:
        [targets, ...], in reading order.
    """
    field: Tensor = micro_batch["fields"][name]
    # A target is predicted one position before its own.
    return field.flatten(0, 1)[target_positions(micro_batch) + 1]


def _chosen_tokens(micro_batch: Mapping[str, Any]) -> float:
    targets, weights = targets_per_sequence(micro_batch)
    return float((targets * weights)[::2].sum())


EXAMPLE_COUNTERS: dict[str, Counter] = {
    "example": lambda micro_batch: float(example_weights(micro_batch).sum())
}
"""Of losses with a sum for each sequence."""

PAIR_COUNTERS: dict[str, Counter] = {
    "pair": lambda micro_batch: float(pair_weights(micro_batch).sum()),
    "chosen token": _chosen_tokens,
}
"""Of losses with a sum for each pair, or for the targets of its chosen sequence."""

LABELLED_TOKEN_COUNTERS: dict[str, Counter] = {
    "token": lambda micro_batch: float(labelled_token_weights(micro_batch).sum()),
}
"""Of losses over tokens with a class; nothing is shifted."""
