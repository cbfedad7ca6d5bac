"""What a trainer reports: its evaluation's loss over all targets, and metrics in their units."""

from collections.abc import Sequence
from typing import Any

from samestep.engine.collectives import gather_results
from samestep.hf.metrics import average_metrics
from samestep.hf.proof import loss_of, select_rows
from samestep.hf.state import State, trainer_of, unit_of
from samestep.hf.units import Batch, library_classes, num_examples
from samestep.hf.window import ignore_rows, rows_of_this_rank


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
        found = parent.prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if found[0] is not None:
            loss = float(found[0].mean())
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
            output.metrics[f"{metric_key_prefix}_loss"] = total / count
        return output

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
