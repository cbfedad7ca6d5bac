"""The metrics of TRL: means of each micro-batch, averaged in their own unit when logged."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from samestep.engine.collectives import all_reduce_sum
from samestep.hf.units import SHIFTED, Batch, library_classes, num_rows

_OF_DPO = {
    "entropy": "completion",
    "mean_token_accuracy": "chosen",
    "logits/chosen": "chosen",
    "logits/rejected": "rejected",
}
"""The unit of each metric of DPO; the others are means over pairs."""

_EXTREMES: Mapping[str, Callable[[list[float]], float]] = {"min_reward": min, "max_reward": max}


def metric_counts(trainer: Any, inputs: Batch) -> dict[str, float]:
    """The number of each unit that a trainer's metrics are means over, in a micro-batch.

    Args:
        trainer: One of TRL, else the result is empty.
        inputs: The micro-batch.

    Returns:
        By the name of the unit, over all ranks, since the metrics are too.
    """
    if "SFTTrainer" in library_classes(trainer):
        counts = {"labels": SHIFTED.count(inputs)}
    elif "DPOTrainer" in library_classes(trainer):
        pairs = num_rows(inputs) // 2
        mask = inputs["completion_mask"][:, 1:] != 0
        chosen, rejected = mask[:pairs].sum(), mask[pairs:].sum()
        counts = {"chosen": chosen, "rejected": rejected, "completion": chosen + rejected}
        counts["pairs"] = torch.tensor(pairs)
    elif "RewardTrainer" in library_classes(trainer):
        counts = {"pairs": torch.tensor(num_rows(inputs) // 2)}
    else:
        return {}
    totals = torch.stack([count.to(trainer.args.device) for count in counts.values()])
    return dict(zip(counts, all_reduce_sum(totals).tolist(), strict=True))


def average_metrics(trainer: Any, mode: str, counts: list[dict[str, float]]) -> None:
    """Replace the values that TRL would average evenly by their average in their own unit.

    Args:
        trainer: Its ``_metrics`` are changed in place.
        mode: ``train`` or ``eval``.
        counts: Of each micro-batch since the last time; see `metric_counts`.
    """
    if not counts:
        return
    units = _OF_DPO if "DPOTrainer" in library_classes(trainer) else {}
    default = "labels" if "labels" in counts[0] else "pairs"
    held = trainer._metrics[mode]
    for name, values in list(held.items()):
        if len(values) != len(counts):
            continue  # not one value for each micro-batch: a total, such as num_tokens
        weights = [each[units.get(name, default)] for each in counts]
        if name in _EXTREMES:
            held[name] = [_EXTREMES[name](values)]
        elif sum(weights):
            pairs = zip(values, weights, strict=True)
            held[name] = [sum(value * weight for value, weight in pairs if weight) / sum(weights)]
