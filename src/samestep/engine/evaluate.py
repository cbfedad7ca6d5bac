"""Evaluation by the same algebra as the step: sums over everything, divided once."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from samestep.engine.collectives import all_gather_object, any_rank
from samestep.engine.counts import add_counts, count_units, input_tokens
from samestep.engine.normalize import TermAccumulator, TermTotals, reduce_terms, reduce_totals
from samestep.engine.oom import memory_guard
from samestep.engine.parallel import (
    Idle,
    gather_micro_batch_results,
    is_sharded,
    prepare_for_step,
    unwrap,
)
from samestep.engine.terms import Counter, Counts, LossFn, MicroBatch, Unit
from samestep.engine.two_pass import GatheredTerms, Shapes
from samestep.errors import DataError
from samestep.utils.modules import eval_mode


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
    micro_batches: Iterable[MicroBatch],
    loss_fn: LossFn,
    *,
    normalize: Unit = "token",
    counters: Mapping[str, Counter] | None = None,
) -> EvalReport:
    """The objective and every term over a whole data set, without gradients.

    The model is put in eval mode, and each of its modules back in its own mode afterwards.
    Micro-batches are taken one at a time, so an iterator needs no memory for all of them. With
    several ranks each gives its own part of the data, and gets the report over all of it.

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
    prepare_for_step(model)
    tally, gathered = TermAccumulator(), GatheredTerms()
    counted_here, tokens_here = list[Counts](), list[int]()

    def own_part() -> tuple[TermTotals, Shapes, Counts, int, int]:
        for micro, counted in _scheduled(model, micro_batches):
            with memory_guard(micro):
                result = loss_fn(unwrap(model), micro)
            if not counted:
                continue
            terms = gathered.take(result)
            if terms:
                tally.add(reduce_terms(terms, micro, normalize=normalize))
            counted_here.append(count_units([micro], counters))
            tokens_here.append(input_tokens(micro))
        sums = add_counts(counted_here)
        return tally.facts(), gathered.shapes(), sums, sum(tokens_here), len(tokens_here)

    with eval_mode(model), torch.no_grad():
        parts = gather_micro_batch_results(model, own_part)
    facts, shapes, counts_by_rank, tokens, pieces = zip(*parts, strict=True)
    if sum(pieces) == 0:
        raise DataError("nothing to evaluate: there is no micro-batch")
    if any(shapes):
        gathered.finish(shapes)
        coupled = TermAccumulator()
        coupled.add(gathered.values())
        facts = (*facts, *all_gather_object(coupled.facts()))
    counts = add_counts(counts_by_rank)
    loss, values = reduce_totals(facts, counts)
    return EvalReport(
        loss=loss,
        terms=values,
        counts=counts,
        seconds=time.perf_counter() - started,
        tokens=sum(tokens),
        micro_batches=sum(pieces),
    )


def _scheduled(
    model: nn.Module, micro_batches: Iterable[MicroBatch | Idle]
) -> Iterator[tuple[MicroBatch, bool]]:
    """The micro-batches; under FSDP2 the last one again until no rank has any left."""
    last = None
    for micro in micro_batches:
        if isinstance(micro, Idle):
            last = micro.micro
            continue
        if is_sharded(model):
            any_rank(True)
        last = micro
        yield micro, True
    while is_sharded(model) and any_rank(False):
        if last is None:
            raise DataError("under fully_shard every rank needs a micro-batch to evaluate")
        yield last, False
