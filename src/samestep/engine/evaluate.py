"""Evaluation by the same algebra as the step: sums over the whole data set, divided once."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from samestep.engine.batch_statistics import check_batch_norm
from samestep.engine.checks import check_micro_batches
from samestep.engine.collectives import all_gather_object, any_rank
from samestep.engine.counts import (
    CountParts,
    add_counts,
    count_parts,
    input_tokens,
    join_counts,
    uncounted_guard,
)
from samestep.engine.first_step import SumCheck
from samestep.engine.modes import eval_mode
from samestep.engine.normalize import TermAccumulator, TermTotals, reduce_terms, reduce_totals
from samestep.engine.oom import memory_guard, without_failed_frames
from samestep.engine.parallel import (
    Idle,
    gather_micro_batch_results,
    is_sharded,
    prepare_for_step,
    unwrap,
)
from samestep.engine.terms import Counter, Counts, LossFn, MicroBatch, Unit
from samestep.engine.two_pass import GatheredTerms, PartShapes
from samestep.errors import DataError


@dataclass(frozen=True)
class EvalReport:
    """The result of an evaluation; the evaluation batch size cannot change it.

    Attributes:
        loss: The objective over all micro-batches together.
        terms: Each term's total / count, without its weight.
        counts: How many of each unit there were.
        seconds: Wall-clock time.
        tokens: Input tokens without padding.
        micro_batches: How many micro-batches there were.

    Example:
        >>> import torch, samestep
        >>> report = samestep.evaluate(
        ...     torch.nn.Identity(),
        ...     [torch.tensor([1.0, 2.0]), torch.tensor([6.0])],
        ...     lambda model, micro_batch: samestep.Term(model(micro_batch).sum(), unit="value"),
        ...     counters={"value": len},
        ... )
        >>> report.loss, report.terms, report.counts, report.micro_batches
        (3.0, {'loss': 3.0}, {'value': 3.0}, 2)
    """

    loss: float
    terms: dict[str, float]
    counts: Counts
    seconds: float
    tokens: int
    micro_batches: int


@without_failed_frames
def evaluate(
    model: nn.Module,
    micro_batches: Iterable[MicroBatch],
    loss_fn: LossFn,
    *,
    normalize: Unit = "token",
    counters: Mapping[str, Counter] | None = None,
    check_sums: bool = True,
    bitwise: bool = False,
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
        check_sums: As for `samestep.step`.
        bitwise: Give `Coupled` terms the same bits on any ranks, in any order of the micro-batches;
            the sums of other terms have them anyway.

    Returns:
        The report.

    Raises:
        StepError: A unit was not counted, a term is not finite, or is no sum over its examples.
        ConfigError: ``micro_batches`` is no iterable of micro-batches, or the model normalises by
            statistics of its micro-batch.
        DataError: There is no micro-batch.

    Example:
        A mean over all rows, whatever the evaluation batch size:

        >>> import torch, samestep
        >>> def loss_fn(model, micro_batch):
        ...     return samestep.Term((model(micro_batch) - 1).square().sum(), unit="row")
        >>> rows = torch.tensor([[0.0], [1.0], [4.0], [3.0]])
        >>> for size in (4, 3, 1):
        ...     report = samestep.evaluate(
        ...         torch.nn.Identity(), rows.split(size), loss_fn, counters={"row": len}
        ...     )
        ...     print(report.micro_batches, report.loss)
        1 3.5
        2 3.5
        4 3.5
    """
    started = time.perf_counter()
    prepare_for_step(model)
    accumulator, gathered = TermAccumulator(), GatheredTerms(sort=bitwise)

    def run_micro_batches() -> tuple[TermTotals, PartShapes, CountParts, int, int]:
        counts, tokens = list[CountParts](), list[int]()
        for micro_batch, is_counted in _scheduled(model, check_micro_batches(micro_batches)):
            counted = count_parts([micro_batch], counters)
            check_sums_once([micro_batch])
            with memory_guard(micro_batch), uncounted_guard(micro_batch, counted):
                result = loss_fn(unwrap(model), micro_batch)
            if not is_counted:
                continue
            terms = gathered.add(result, micro_batch)
            if terms:
                accumulator.add(reduce_terms(terms, micro_batch, normalize=normalize))
            counts.append(counted)
            tokens.append(input_tokens(micro_batch))
        shapes = gathered.shapes()
        return accumulator.totals(), shapes, join_counts(counts), sum(tokens), len(tokens)

    with eval_mode(model), torch.no_grad():
        check_batch_norm(model)
        check_sums_once = SumCheck(
            model, loss_fn, normalize=normalize, counters=counters, enabled=check_sums
        )
        results = gather_micro_batch_results(model, run_micro_batches)
    totals, shapes, counts_by_rank, tokens, num_micro_batches = zip(*results, strict=True)
    if sum(num_micro_batches) == 0:
        raise DataError("nothing to evaluate: there is no micro-batch")
    if any(shapes):
        gathered.compute(shapes)
        coupled = TermAccumulator()
        coupled.add(gathered.values())
        totals = (*totals, *all_gather_object(coupled.totals()))
    counts = add_counts(counts_by_rank)
    loss, values = reduce_totals(totals, counts)
    return EvalReport(
        loss=loss,
        terms=values,
        counts=counts,
        seconds=time.perf_counter() - started,
        tokens=sum(tokens),
        micro_batches=sum(num_micro_batches),
    )


def _scheduled(
    model: nn.Module, micro_batches: Iterable[MicroBatch | Idle]
) -> Iterator[tuple[MicroBatch, bool]]:
    """The micro-batches, and whether each counts.

    Under FSDP2 the last one is run again, uncounted, until no rank has any left.
    """
    last = None
    for item in micro_batches:
        if isinstance(item, Idle):
            last = item.micro_batch
            continue
        if is_sharded(model):
            any_rank(True)
        last = item
        yield item, True
    while is_sharded(model) and any_rank(False):
        if last is None:
            raise DataError("under fully_shard every rank needs a micro-batch to evaluate")
        yield last, False
