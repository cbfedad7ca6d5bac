"""THE step: count, forward and backward, clip, update.

    objective = sum over terms of  weight * total / count(unit over the whole effective batch)

The counts come from the data before any backward, over all ranks, so each micro-batch's share is
final when its gradient is made, and the micro-batches may be of any size and number, on any rank.
"""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from samestep.engine.checks import check_optimizer_params, check_scaler, nonfinite_gradient_error
from samestep.engine.collectives import gather_results
from samestep.engine.counts import add_counts, count_units, input_tokens
from samestep.engine.gradients import (
    assign_gradients,
    clip_grad_norm_,
    float32_accumulation,
    params_without_grad,
    sum_over_replicas,
)
from samestep.engine.normalize import (
    TermAccumulator,
    TermTotals,
    objective_share,
    reduce_terms,
    reduce_totals,
)
from samestep.engine.oom import memory_guard
from samestep.engine.parallel import (
    Idle,
    gather_micro_batch_results,
    is_sharded,
    no_gradient_sync,
    prepare_for_step,
    schedule_micro_batches,
    unwrap,
    zero_loss,
)
from samestep.engine.terms import Counter, Counts, LossFn, MicroBatch, Unit
from samestep.engine.two_pass import first_pass


@dataclass(frozen=True)
class StepReport:
    """What one step did. Reported is optimised: ``loss`` is the objective that was descended.

    Attributes:
        loss: The objective over the whole effective batch, before the update.
        terms: Each term's total / count, without its weight.
        counts: How many of each unit the effective batch held.
        grad_norm: Global 2-norm of the gradient before clipping.
        seconds: Wall-clock time of the step.
        tokens: Input tokens without padding (0 where the micro-batches have no ``input_ids``).
        micro_batches: How many micro-batches the batch was split into, over all ranks.
        skipped: Why the weights were left alone ("no targets", "overflow"), or None.
    """

    loss: float
    terms: dict[str, float]
    counts: Counts
    grad_norm: float
    seconds: float
    tokens: int
    micro_batches: int
    skipped: str | None = None


def step(
    model: nn.Module,
    optimizer: Optimizer,
    micro_batches: Iterable[MicroBatch],
    loss_fn: LossFn,
    *,
    max_grad_norm: float | None = None,
    normalize: Unit = "token",
    counters: Mapping[str, Counter] | None = None,
    scaler: GradScaler | None = None,
) -> StepReport:
    """One optimizer step on one effective batch, the same however the batch is split.

    Gradients left from before are cleared first, and those of this step at the end.

    Args:
        model: The model, in the mode (train or eval) that you want. With several ranks: a plain
            module (the same on every rank), DDP, or a module after FSDP2's ``fully_shard``.
        optimizer: Updates the weights, once.
        micro_batches: The effective batch, in micro-batches of any sizes; with several ranks, this
            rank's part of it, which may be empty (under FSDP2 it is then one `Idle`).
        loss_fn: Maps (model, micro-batch) to a `Term` or ``{name: Term}``: sums, not means. One
            that returns `Coupled` terms is declared by `TwoPass`. It gets the module inside DDP.
        max_grad_norm: Clip the global gradient norm to this, after normalisation; None: do not.
        normalize: What terms in tokens are normalised by: "token", "sequence" (each sequence
            weighs the same; needs totals [sequences]) or `constant`.
        counters: Counters of further units, as {unit: function of a micro-batch}.
        scaler: A gradient scaler for float16 autocast; a step that overflows is skipped.

    Returns:
        The report.

    Raises:
        StepError: A unit was not counted; a term or the gradient is not finite
            (`NotFiniteError`, which names it); a micro-batch does not fit into memory
            (`OutOfMemoryError`). The weights are then unchanged and no gradient is left behind.
        ConfigError: What the step cannot make exact: a scaler with weights of low precision, an
            optimizer over weights that are not the model's, or weights that lie on the ranks in an
            unknown way.
    """
    started = time.perf_counter()
    skipped, norm = None, 0.0
    micros, counts, tokens, pieces = count_batch(micro_batches, counters)
    weights = prepare_for_step(model)
    check_optimizer_params(model, optimizer)

    loss, terms, gradients = accumulate(
        model, weights, micros, loss_fn, counts=counts, normalize=normalize, scaler=scaler
    )
    if nothing_counted(counts):
        skipped = "no targets"
    else:
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = float(clip_grad_norm_(list(gradients.values()), max_grad_norm))
        if math.isfinite(norm):
            assign_gradients(gradients)
            optimizer.step()
        elif scaler is not None:
            skipped = "overflow"
        else:
            raise nonfinite_gradient_error(model, gradients)
        if scaler is not None:
            scaler.update()
    model.zero_grad()
    return StepReport(
        loss=loss,
        terms=terms,
        counts=counts,
        grad_norm=norm,
        seconds=time.perf_counter() - started,
        tokens=tokens,
        micro_batches=pieces,
        skipped=skipped,
    )


def backward(
    model: nn.Module,
    micro_batches: Iterable[MicroBatch],
    loss_fn: LossFn,
    *,
    normalize: Unit = "token",
    counters: Mapping[str, Counter] | None = None,
) -> tuple[float, dict[str, float]]:
    """Leave the exact gradient of the effective batch in ``.grad``, and update nothing.

    For loops that own their optimizer, and for looking at gradients.

    Args:
        model: The model; gradients left from before are cleared.
        micro_batches: As for `step`.
        loss_fn: As for `step`.
        normalize: As for `step`.
        counters: As for `step`.

    Returns:
        The objective and each term's total / count.

    Raises:
        StepError: As for `step`.
    """
    micros, counts, _, _ = count_batch(micro_batches, counters)
    loss, terms, gradients = accumulate(
        model, prepare_for_step(model), micros, loss_fn, counts=counts, normalize=normalize
    )
    assign_gradients(gradients)
    return loss, terms


def accumulate(
    model: nn.Module,
    weights: list[nn.Parameter],
    micros: list[MicroBatch],
    loss_fn: LossFn,
    *,
    counts: Counts,
    normalize: Unit,
    scaler: GradScaler | None = None,
) -> tuple[float, dict[str, float], dict[nn.Parameter, Tensor]]:
    """Forward and backward of each micro-batch, with every share already normalised.

    Args:
        model: The model.
        weights: Those that train, as `samestep.engine.parallel.prepare_for_step` gives them.
        micros: This rank's micro-batches; none is run if nothing was counted on any rank.
        loss_fn: As for `step`.
        counts: The counts over the whole effective batch, all ranks included.
        normalize: As for `step`.
        scaler: As for `step`.

    Returns:
        The objective, each term's total / count, and the gradient of each weight that got one
        (float32 for weights of low precision), added up over the ranks.

    Raises:
        StepError: As for `step`.
        ConfigError: As for `step`.
    """
    check_scaler(model, weights, scaler)
    model.zero_grad()
    tally, runs = (
        TermAccumulator(),
        [] if nothing_counted(counts) else schedule_micro_batches(model, micros),
    )

    def own_part() -> tuple[TermTotals, list[int]]:
        """Run this rank's micro-batches: what they found, and the weights that they missed."""
        for micro, number in runs:
            with memory_guard(micro):
                result = loss_fn(unwrap(model), micro)
                if number is None:
                    zero_loss(result).backward()
                    continue
                result = gathered.resolve(result, number)
                sums = reduce_terms(result, micro, normalize=normalize)
                share = objective_share(sums, counts)
                if share is not None:
                    (share if scaler is None else scaler.scale(share)).backward()
                tally.add(sums)
        gathered.check_repeated(model, runs, loss_fn)
        return tally.facts(), params_without_grad(weights, gradients)

    with no_gradient_sync(model), float32_accumulation(weights) as gradients:
        gathered = first_pass(model, runs, loss_fn)
        parts = gather_micro_batch_results(model, own_part)
        loss, terms = reduce_totals([facts for facts, _ in parts], counts)
    if not is_sharded(model):
        sum_over_replicas(gradients, weights, missed_by=[missing for _, missing in parts])
    return loss, terms, gradients


def count_batch(
    micro_batches: Iterable[MicroBatch], counters: Mapping[str, Counter] | None
) -> tuple[list[MicroBatch], Counts, int, int]:
    """This rank's micro-batches, and what the effective batch holds over all ranks.

    Args:
        micro_batches: As for `step`.
        counters: As for `step`.

    Returns:
        The micro-batches of this rank; the counts, input tokens and micro-batches of all.

    Raises:
        StepError: As for `samestep.engine.counts.count_units`.
    """
    micros: list[MicroBatch] = []

    def own_part() -> tuple[Counts, int, int]:
        micros.extend(micro_batches)
        real = [micro for micro in micros if not isinstance(micro, Idle)]
        return count_units(real, counters), sum(map(input_tokens, real)), len(real)

    counts, tokens, pieces = zip(*gather_results(own_part), strict=True)
    return micros, add_counts(counts), sum(tokens), sum(pieces)


def nothing_counted(counts: Counts) -> bool:
    """Whether the batch was counted and holds nothing to learn from."""
    return bool(counts) and not any(counts.values())
