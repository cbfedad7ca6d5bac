"""The optimizer step, from the top: the order of its stages, and nothing of what each does.

    objective = sum over terms of  weight * total / count(unit over the whole effective batch)

The counts come from the data before any backward, over all ranks, so each micro-batch's share is
final when its gradient is made, and the micro-batches may be of any size and number, on any rank.

The whole step is this file and those beside it, of which each does one part:

- what is a target, and what is counted: `samestep.engine.targets`, `samestep.engine.counts`,
  `samestep.engine.batch`, `samestep.engine.device_copy`;
- what a loss returns: `samestep.engine.terms`;
- dividing, and adding terms up over micro-batches and ranks: `samestep.engine.normalize`;
- a first pass for terms that couple the batch: `samestep.engine.two_pass`;
- adding gradients up over micro-batches and ranks, and clipping: `samestep.engine.gradients`;
- which micro-batches a rank runs under DDP and FSDP2: `samestep.engine.parallel`;
- talking to the other ranks: `samestep.engine.collectives`;
- the same bits whatever the ranks: `samestep.engine.bitwise`, `samestep.engine.exact_sum`;
- refusing and explaining: `samestep.engine.checks`, `samestep.engine.batch_statistics`,
  `samestep.engine.oom`;
- a trial before the first step, that the loss sums: `samestep.engine.first_step`, which cuts a
  micro-batch in two by `samestep.engine.cut`.

The update itself is ``optimizer.step()``, here. `samestep.engine.evaluate` is the same algebra
without gradients.
"""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from samestep.engine.batch import count_batch, has_no_targets
from samestep.engine.batch_statistics import check_batch_norm
from samestep.engine.bitwise import Bitwise, GridSums
from samestep.engine.checks import (
    check_optimizer_params,
    check_scaler,
    check_terms_reach_weights,
    check_trains,
    nonfinite_gradient_error,
)
from samestep.engine.counts import uncounted_guard
from samestep.engine.first_step import SumCheck
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
from samestep.engine.oom import (
    clipping_guard,
    memory_guard,
    update_guard,
    without_failed_frames,
)
from samestep.engine.parallel import (
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

    Example:
        >>> import torch, samestep
        >>> model = torch.nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> empty = {"labels": torch.full((2, 4), -100)}
        >>> def loss_fn(model, micro_batch):
        ...     raise AssertionError("not run: the batch holds no target")
        >>> report = samestep.step(model, optimizer, [empty], loss_fn)
        >>> report.skipped, report.loss, report.counts["token"], report.micro_batches
        ('no targets', 0.0, 0.0, 1)
    """

    loss: float
    terms: dict[str, float]
    counts: Counts
    grad_norm: float
    seconds: float
    tokens: int
    micro_batches: int
    skipped: str | None = None


@without_failed_frames
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
    check_sums: bool = True,
    bitwise: Bitwise | None = None,
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
        check_sums: Cut one micro-batch in two, on the first step of a model and a loss, and compare
            the terms: a mean is no sum. It costs about two forwards, once; later steps nothing.
        bitwise: One object for all steps of a run: then the same micro-batches give the same bits,
            in any order and on any ranks.

    Returns:
        The report.

    Raises:
        StepError: A unit was not counted; a term is no sum over its examples, or no weight can
            learn from it; a term or the gradient is not finite
            (`NotFiniteError`, which names it); a micro-batch does not fit into memory
            (`OutOfMemoryError`). The weights are then unchanged and no gradient is left behind,
            but where memory runs out in the middle of the update, which the message then says.
        ConfigError: What the step cannot make exact: a scaler with weights of low precision, an
            optimizer over weights that are not the model's, BatchNorm in train mode, or weights
            that are distributed over the ranks in an unknown way. Or an argument of the wrong
            kind, or a model or an optimizer of which no weight trains.
        DataError: There is no micro-batch on any rank.

    Example:
        Six ragged rows, at once and one by one: the same counts, the same weights after.

        >>> import torch, samestep
        >>> _ = torch.manual_seed(0)
        >>> rows, labels = torch.rand(6, 5, 3).double(), torch.ones(6, 5).long()
        >>> for i in range(6):
        ...     labels[i, i % 4 + 2 :] = -100
        >>> def loss_fn(model, micro_batch):
        ...     is_target = micro_batch["labels"][:, 1:] != -100
        ...     errors = (model(micro_batch["rows"])[:, :-1, 0] - 1).square()
        ...     return samestep.Term(errors[is_target].sum(), unit="token")
        >>> def train(size):
        ...     model = torch.nn.Linear(3, 1).double()
        ...     torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     micro_batches = [
        ...         {"rows": part, "labels": part_labels}
        ...         for part, part_labels in zip(rows.split(size), labels.split(size))
        ...     ]
        ...     report = samestep.step(model, optimizer, micro_batches, loss_fn, max_grad_norm=1.0)
        ...     print(report.counts["token"], report.micro_batches, round(report.loss, 6))
        ...     return model.weight.detach()
        >>> torch.allclose(train(6), train(1), rtol=1e-12)
        13.0 1 1.0
        13.0 6 1.0
        True
    """
    started = time.perf_counter()
    skipped, norm = None, 0.0
    local_micro_batches, counts, tokens, num_micro_batches = count_batch(micro_batches, counters)
    weights = prepare_for_step(model)
    check_optimizer_params(model, optimizer)

    run = partial(
        accumulate,
        model,
        weights,
        micro_batches=local_micro_batches,
        loss_fn=loss_fn,
        counts=counts,
        normalize=normalize,
        scaler=scaler,
        counters=counters,
        check_sums=check_sums,
    )
    if bitwise is None:
        loss, terms, gradients = run()
    else:
        loss, terms, gradients = bitwise.sum_exactly(
            lambda sums: run(grid_sums=sums), model, packs=num_micro_batches, scaler=scaler
        )
    if has_no_targets(counts):
        skipped = "no targets"
    else:
        if scaler is not None:
            scaler.unscale_(optimizer)
        with clipping_guard():
            norm = float(clip_grad_norm_(list(gradients.values()), max_grad_norm))
        if math.isfinite(norm):
            with update_guard(gradients, optimizer):
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
        micro_batches=num_micro_batches,
        skipped=skipped,
    )


@without_failed_frames
def backward(
    model: nn.Module,
    micro_batches: Iterable[MicroBatch],
    loss_fn: LossFn,
    *,
    normalize: Unit = "token",
    counters: Mapping[str, Counter] | None = None,
    check_sums: bool = True,
) -> tuple[float, dict[str, float]]:
    """Leave the exact gradient of the effective batch in ``.grad``, and update nothing.

    For loops that own their optimizer, and for looking at gradients.

    Args:
        model: The model; gradients left from before are cleared.
        micro_batches: As for `step`.
        loss_fn: As for `step`.
        normalize: As for `step`.
        counters: As for `step`.
        check_sums: As for `step`.

    Returns:
        The objective and each term's total / count.

    Raises:
        StepError: As for `step`.
        ConfigError: As for `step`.
        DataError: As for `step`.

    Example:
        >>> import torch, samestep
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> def loss_fn(model, micro_batch):
        ...     return samestep.Term(model(micro_batch).sum(), unit="row")
        >>> rows = torch.tensor([[1.0], [2.0], [6.0]])
        >>> for size in (3, 2, 1):
        ...     _ = samestep.backward(model, rows.split(size), loss_fn, counters={"row": len})
        ...     print(round(model.weight.grad.item(), 4))
        3.0
        3.0
        3.0
    """
    local_micro_batches, counts, _, _ = count_batch(micro_batches, counters)
    loss, terms, gradients = accumulate(
        model,
        prepare_for_step(model),
        micro_batches=local_micro_batches,
        loss_fn=loss_fn,
        counts=counts,
        normalize=normalize,
        counters=counters,
        check_sums=check_sums,
    )
    assign_gradients(gradients)
    return loss, terms


def accumulate(
    model: nn.Module,
    weights: list[nn.Parameter],
    *,
    micro_batches: list[MicroBatch],
    loss_fn: LossFn,
    counts: Counts,
    normalize: Unit,
    scaler: GradScaler | None = None,
    counters: Mapping[str, Counter] | None = None,
    check_sums: bool = True,
    grid_sums: GridSums | None = None,
) -> tuple[float, dict[str, float], dict[nn.Parameter, Tensor]]:
    """Forward and backward of each micro-batch, with every share already normalised.

    Args:
        model: The model.
        weights: Those that train, of `samestep.engine.parallel.prepare_for_step`.
        micro_batches: This rank's micro-batches; none is run if nothing was counted on any rank.
        loss_fn: As for `step`.
        counts: The counts over the whole effective batch, all ranks included.
        normalize: As for `step`.
        scaler: As for `step`.
        counters: As for `step`.
        check_sums: As for `step`.
        grid_sums: Adds the gradients up as integers, in the place of floats.

    Returns:
        The objective, each term's total / count, and the gradient of each weight that got one
        (float32 for weights of low precision), added up over the ranks.

    Raises:
        StepError: As for `step`.
        ConfigError: As for `step`.
    """
    check_trains(model, weights)
    check_batch_norm(model)
    check_scaler(model, weights, scaler=scaler)
    model.zero_grad()
    accumulator = TermAccumulator()
    schedule = [] if has_no_targets(counts) else schedule_micro_batches(model, micro_batches)

    def run_micro_batches() -> tuple[TermTotals, list[int]]:
        """Run this rank's micro-batches: their totals, and the weights without a gradient."""
        check_sums_once([micro_batch for micro_batch, _ in schedule])
        for micro_batch, index in schedule:
            with memory_guard(micro_batch), uncounted_guard(micro_batch, counts):
                result = loss_fn(unwrap(model), micro_batch)
                if index is None:
                    zero_loss(result).backward()
                    continue
                result = gathered.resolve(result, index)
                sums = reduce_terms(result, micro_batch, normalize=normalize)
                share = objective_share(sums, counts)
                if share is not None:
                    (share if scaler is None else scaler.scale(share)).backward()
                if grid_sums is None or grid_sums.end_pack(sums):
                    accumulator.add(sums)
        gathered.check_repeated(model, schedule, loss_fn=loss_fn)
        return accumulator.totals(), params_without_grad(weights, gradients)

    check_sums_once = SumCheck(
        model, loss_fn, normalize=normalize, counters=counters, enabled=check_sums
    )
    adding = float32_accumulation(weights) if grid_sums is None else grid_sums.adding()
    with no_gradient_sync(model), adding as gradients:
        gathered = first_pass(model, schedule, loss_fn=loss_fn, sort=grid_sums is not None)
        if grid_sums is not None:
            schedule = grid_sums.with_trial(schedule)
        totals, without_grad = zip(
            *gather_micro_batch_results(model, run_micro_batches), strict=True
        )
        loss, terms = reduce_totals(totals, counts)
        check_terms_reach_weights(totals, without_grad, num_weights=len(weights))
    if grid_sums is not None:
        return loss, terms, grid_sums.reduce(without_grad)
    if not is_sharded(model):
        sum_over_replicas(gradients, weights, without_grad_by_rank=without_grad)
    return loss, terms, gradients
