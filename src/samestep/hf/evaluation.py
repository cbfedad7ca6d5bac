"""What a trainer reports: its evaluation's loss over all targets, and metrics in their units.

The metrics of TRL are lists of means, one of each micro-batch, that it averages evenly.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from samestep.engine.collectives import all_reduce_sum, gather_results
from samestep.hf.proof import METRICS, loss_of, select_rows
from samestep.hf.units import (
    SHIFTED,
    Batch,
    library_classes,
    num_examples,
    num_pairs,
    stacks_pairs,
)
from samestep.hf.window import State, ignore_rows, rows_of_this_rank, trainer_of, unit_of

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
    elif "DPOTrainer" in library_classes(trainer) and stacks_pairs(inputs):
        pairs = num_pairs(inputs)
        mask = inputs["completion_mask"][:, 1:] != 0
        chosen, rejected = mask[:pairs].sum(), mask[pairs:].sum()
        counts = {"chosen": chosen, "rejected": rejected, "completion": chosen + rejected}
        counts["pairs"] = torch.tensor(pairs)
    elif {"DPOTrainer", "RewardTrainer"} & {*library_classes(trainer)}:
        counts = {"pairs": torch.tensor(num_pairs(inputs))}
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
    held = _held_metrics(trainer, mode)
    for name, values in list(held.items()):
        if len(values) != len(counts):
            continue  # not one value for each micro-batch: a total, such as num_tokens
        unit = units.get(name, default)
        if name in _EXTREMES:
            held[name] = [_EXTREMES[name](values)]
            continue
        if unit not in counts[0]:
            continue  # the batches of earlier TRL do not say which tokens are of a completion
        weights = [each[unit] for each in counts]
        if sum(weights):
            pairs = zip(values, weights, strict=True)
            held[name] = [sum(value * weight for value, weight in pairs if weight) / sum(weights)]


def _held_metrics(trainer: Any, mode: str) -> Any:
    """The lists of metrics that a trainer keeps until it logs, by its release's name."""
    for name in METRICS:
        held = vars(trainer).get(name)
        if isinstance(held, Mapping) and isinstance(held.get(mode), Mapping):
            return held[mode]
    return {}


class ExactEvaluation:
    """The hooks of evaluation and of logging; see `samestep.hf.exact_trainer.Exact`."""

    _samestep: State

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """The trainer's own; the loss is kept with its count."""
        parent: Any = super()
        state, trainer = self._samestep, trainer_of(self)
        if state.complete or state.evaluated is None or not _has_targets(trainer, inputs):
            return parent.prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        unit = unit_of(self, [inputs])
        whole = inputs
        keep = rows_of_this_rank(trainer.accelerator, inputs, paired=unit.paired)
        partial = keep < num_examples(whole, paired=unit.paired)
        alone = select_rows(whole, range(keep), paired=unit.paired) if partial else whole
        if partial and unit.masks:
            inputs = ignore_rows(whole, keep)
        count = float(unit.count(alone)) if keep else 0.0
        arguments = (model, inputs, prediction_loss_only, ignore_keys)
        if state.balance is None:
            found = parent.prediction_step(*arguments)
            loss = None if found[0] is None else float(found[0].mean())
        else:
            with state.balance.in_evaluation(inputs, keep=keep) as without:
                found = parent.prediction_step(*arguments)
            loss = None if found[0] is None else without(float(found[0].mean()))
        if loss is not None:
            if keep and partial and not unit.masks and not library_classes(trainer):
                loss = float(loss_of(trainer, alone))
            state.evaluated.append((loss * count if count else 0.0, count))
        return found

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The trainer's own; its loss is the sum over all targets, divided once."""
        parent: Any = super()
        state = self._samestep
        arguments = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if state.complete:
            return parent.evaluation_loop(*arguments)
        outer, state.evaluated = state.evaluated, []
        try:
            output = parent.evaluation_loop(*arguments)
            parts = gather_results(lambda: _sums(state.evaluated or []))
        finally:
            state.evaluated = outer
        total, count = _sums(parts)
        if count and f"{metric_key_prefix}_loss" in output.metrics:
            output.metrics[f"{metric_key_prefix}_loss"] = total / count + self._balanced()
        return output

    def _balanced(self) -> float:
        """The router loss over the evaluation, as it stands in the loss; 0 where there is none."""
        balance = self._samestep.balance
        if balance is None:
            return 0.0
        value, weight = balance.end_evaluation()
        held = _held_metrics(self, "eval")
        if "aux_loss" in held:
            held["aux_loss"] = [value] * len(held["aux_loss"])
        return float(weight * value)

    def log(self, logs: Any, *args: Any, **options: Any) -> None:
        """The trainer's own; metrics of micro-batches are averaged in their own units."""
        parent: Any = super()
        state = self._samestep
        mode = "train" if trainer_of(self).model.training else "eval"
        average_metrics(self, mode, state.metrics[mode])
        state.metrics[mode] = []
        parent.log(logs, *args, **options)


def _has_targets(trainer: Any, inputs: Batch) -> bool:
    if library_classes(trainer):
        return True
    return all(inputs.get(name) is not None for name in trainer.label_names)


def _sums(parts: Sequence[Sequence[float]]) -> tuple[float, float]:
    return sum(part[0] for part in parts), sum(part[1] for part in parts)
