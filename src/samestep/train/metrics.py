"""Metrics beside a loss: sums with units, in the same evaluation, for any size of its batches."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from samestep.engine.counts import targets_per_sequence
from samestep.engine.evaluate import EvalReport
from samestep.engine.targets import num_sequences, sequence_ids, target_positions
from samestep.engine.terms import LossFn, LossResult, Objective, Term, named_terms
from samestep.engine.two_pass import TwoPass
from samestep.errors import ConfigError, SamestepError
from samestep.models.lm_head import UpToHead
from samestep.objectives.units import weights_at_targets
from samestep.train.settings.evaluation import METRICS
from samestep.utils.plugins import load_object


@dataclass(frozen=True)
class LanguageMetrics:
    """The metrics of the table, as terms of weight 0: one forward, whichever are asked for.

    Attributes:
        names: Which. The total of "perplexity" is that of the negative log likelihood: its
            exponential is taken once, of the mean over the whole set (`finished`).
    """

    names: Sequence[str]
    up_to_head: UpToHead = field(default_factory=UpToHead, repr=False, compare=False)

    def __call__(self, model: Any, micro_batch: Mapping[str, Any]) -> dict[str, Term]:
        """Sums over one micro-batch."""
        likelihoods = self.up_to_head.target_likelihoods(model, micro_batch)
        weights = weights_at_targets(micro_batch, "token").to(likelihoods.nll)
        correct = likelihoods.correct.to(likelihoods.nll)
        totals: dict[str, Callable[[], Term]] = {
            "perplexity": lambda: Term((weights * likelihoods.nll).sum(), weight=0.0),
            "token_accuracy": lambda: Term((weights * correct).sum(), weight=0.0),
            "sequence_accuracy": lambda: Term(
                _right_sequences(micro_batch, wrong=(weights > 0) * (1 - correct)),
                unit="sequence",
                weight=0.0,
            ),
        }
        return {name: totals[name]() for name in self.names}


def _right_sequences(micro_batch: Mapping[str, Any], *, wrong: Tensor) -> Tensor:
    """The weight of the sequences that have targets, none of them wrong.

    Args:
        micro_batch: The micro-batch.
        wrong: 1 for each wrong target [targets], else 0.
    """
    ids = sequence_ids(micro_batch).flatten()[target_positions(micro_batch)]
    errors = wrong.new_zeros(num_sequences(micro_batch)).index_add_(0, ids, wrong)
    targets, weights = targets_per_sequence(micro_batch)
    return (weights * (targets > 0) * (errors == 0)).sum()


def with_metrics(objective: Objective, names: Sequence[str]) -> Objective:
    """What is evaluated: the terms of an objective, and those of metrics.

    Args:
        objective: What is optimised.
        names: As ``metrics``.

    Returns:
        The objective itself without metrics.

    Raises:
        ConfigError: There is no such metric.
    """
    if not {*names} - {"exact_match"}:  # which is no matter of a forward: train/answers.py
        return objective
    own = [_Own(name) for name in names if name not in METRICS]
    table = [name for name in names if name in METRICS and name != "exact_match"]
    functions: list[LossFn] = [LanguageMetrics(table)] if table else []
    functions += own

    def both(model: Any, micro: Any) -> LossResult:
        terms = dict(named_terms(objective.loss_fn(model, micro)))
        for function in functions:
            found = named_terms(function(model, micro))
            repeated = sorted(found.keys() & terms.keys())
            if repeated:
                raise ConfigError(
                    f"metrics: {', '.join(repeated)} is there twice: give the terms of your own "
                    "metric another name"
                )
            terms |= found
        return terms

    counters = {name: counter for each in own for name, counter in each.counters.items()}
    return replace(
        objective,
        loss_fn=TwoPass(both) if isinstance(objective.loss_fn, TwoPass) else both,
        counters={**counters, **objective.counters},
    )


class _Own:
    """A metric of the user's own; its terms weigh nothing.

    Args:
        reference: ``file.py:name`` or ``package.module:name``.
    """

    def __init__(self, reference: str) -> None:
        found = load_object(reference, what="metrics")
        self._reference = reference
        self._name = reference.rpartition(":")[2]
        objective = found if isinstance(found, Objective) else Objective(found)
        self.counters = objective.counters
        self._function = objective.loss_fn
        if not callable(self._function) or isinstance(self._function, type):
            raise ConfigError(
                f"metrics: {reference} is {type(found).__name__}, not a function (model, "
                "micro-batch) that returns samestep.Term(total, unit) or terms by name, nor a "
                "samestep.Objective of one"
            )

    def __call__(self, model: Any, micro_batch: Any) -> dict[str, Term]:
        try:
            result = self._function(model, micro_batch)
        except SamestepError:
            raise
        except Exception as error:  # the user's code may raise anything
            names = ", ".join(micro_batch) if isinstance(micro_batch, Mapping) else ""
            raise ConfigError(
                f"metrics: {self._reference} fails on a micro-batch: {type(error).__name__}: "
                f"{error} (it has: {names})"
            ) from error
        terms = {self._name: result} if isinstance(result, Term) else named_terms(result)
        others = [name for name, term in terms.items() if not isinstance(term, Term)]
        if others:
            raise ConfigError(
                f"metrics: {self._reference} gives {', '.join(others)} as something else than a "
                "samestep.Term"
            )
        return {
            name: replace(term, weight=0.0)
            for name, term in terms.items()
            if isinstance(term, Term)
        }


def finished(report: EvalReport, names: Sequence[str]) -> EvalReport:
    """A report with the values of the metrics made of the means of their terms.

    Args:
        report: Of an evaluation of `with_metrics`.
        names: As ``metrics``.

    Returns:
        The report; "perplexity" is the exponential of what it was.
    """
    if "perplexity" not in names:
        return report
    mean = report.terms["perplexity"]
    value = math.exp(mean) if mean < 700 else math.inf
    return replace(report, terms={**report.terms, "perplexity": value})
