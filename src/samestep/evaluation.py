"""Evaluation by the same algebra as the step: sums over everything, divided once."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from samestep.errors import DataError
from samestep.ranks import refuse_several_ranks
from samestep.tally import Tally
from samestep.terms import Counter, Counts, LossFn, Micro, Unit, count, input_tokens, reduce_terms
from samestep.two_pass import Gathered


@dataclass(frozen=True)
class EvalReport:
    """What an evaluation found; the evaluation batch size cannot change it.

    Attributes:
        loss: The objective over all micro-batches together.
        terms: Each term's total / count, without its weight.
        counts: How many of each unit there were.
        seconds: Wall-clock time.
        tokens: Input tokens without padding.
        micro_batches: How many micro-batches there were.
    """

    loss: float
    terms: dict[str, float]
    counts: Counts
    seconds: float
    tokens: int
    micro_batches: int


def evaluate(
    model: nn.Module,
    micro_batches: Iterable[Micro],
    loss_fn: LossFn,
    *,
    normalize: Unit = "token",
    counters: Mapping[str, Counter] | None = None,
) -> EvalReport:
    """The objective and every term over a whole data set, without gradients.

    The model is put in eval mode, and each of its modules back in its own mode afterwards.
    Micro-batches are taken one at a time, so an iterator needs no memory for all of them.

    Args:
        model: The model.
        micro_batches: The data, in micro-batches of any sizes.
        loss_fn: As for `samestep.step`.
        normalize: As for `samestep.step`.
        counters: As for `samestep.step`.

    Returns:
        The report.

    Raises:
        StepError: A unit was not counted, or a term is not finite.
        DataError: There is no micro-batch.
    """
    started = time.perf_counter()
    refuse_several_ranks()
    training = {module: module.training for module in model.modules()}
    counts: Counts = {}
    tally, gathered, tokens, micros = Tally(), Gathered(), 0, 0
    model.eval()
    try:
        with torch.no_grad():
            for micro in micro_batches:
                for unit, found in count([micro], counters).items():
                    counts[unit] = counts.get(unit, 0.0) + found
                terms = gathered.take(loss_fn(model, micro))
                if terms:
                    tally.add(reduce_terms(terms, micro, normalize=normalize))
                tokens += input_tokens(micro)
                micros += 1
    finally:
        for module, mode in training.items():
            module.training = mode
    if micros == 0:
        raise DataError("nothing to evaluate: there is no micro-batch")
    gathered.finish()
    tally.add(gathered.values())
    loss, values = tally.read(counts)
    return EvalReport(
        loss=loss,
        terms=values,
        counts=counts,
        seconds=time.perf_counter() - started,
        tokens=tokens,
        micro_batches=micros,
    )
