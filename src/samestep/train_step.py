"""THE step: count, forward and backward, clip, update.

    objective = sum over terms of  weight * total / count(unit over the whole effective batch)

The counts come from the data before any backward, so each micro-batch's share is final when
its gradient is made, and the micro-batches may be of any size and number.
"""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from samestep.errors import ConfigError, StepError
from samestep.gradients import LOW_PRECISION, assign, clip_, float32_accumulation
from samestep.ranks import refuse_several_ranks
from samestep.tally import Tally, objective_share
from samestep.terms import Counter, Counts, LossFn, Micro, Unit, count, input_tokens, reduce_terms
from samestep.two_pass import first_pass


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
        micro_batches: How many micro-batches the batch was split into.
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
    micro_batches: Iterable[Micro],
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
        model: The model, in the mode (train or eval) that you want.
        optimizer: Updates the weights, once.
        micro_batches: The effective batch, in micro-batches of any sizes.
        loss_fn: Maps (model, micro-batch) to a `Term` or ``{name: Term}``: sums, not means. One
            that returns `Coupled` terms is declared by `TwoPass`.
        max_grad_norm: Clip the global gradient norm to this, after normalisation; None: do not.
        normalize: What terms in tokens are normalised by: "token", "sequence" (each sequence
            weighs the same; needs totals [sequences]) or `constant`.
        counters: Counters of further units, as {unit: function of a micro-batch}.
        scaler: A gradient scaler for float16 autocast; a step that overflows is skipped.

    Returns:
        The report.

    Raises:
        StepError: A unit was not counted, or a term or the gradient is not finite (the term is
            named). The weights are then unchanged and no gradient is left behind.
        ConfigError: What the step cannot make exact: several ranks, a scaler with weights of low
            precision, or an optimizer over weights that are not the model's.
    """
    started = time.perf_counter()
    micros = list(micro_batches)
    counts, skipped, norm = count(micros, counters), None, 0.0
    _refuse_strangers(model, optimizer)

    loss, terms, gradients = accumulate(
        model, micros, loss_fn, counts=counts, normalize=normalize, scaler=scaler
    )
    if nothing_counted(counts):
        skipped = "no targets"
    else:
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = float(clip_(list(gradients.values()), max_grad_norm))
        if math.isfinite(norm):
            assign(gradients)
            optimizer.step()
        elif scaler is not None:
            skipped = "overflow"
        else:
            raise _not_finite(model, gradients)
        if scaler is not None:
            scaler.update()
    model.zero_grad()
    return StepReport(
        loss=loss,
        terms=terms,
        counts=counts,
        grad_norm=norm,
        seconds=time.perf_counter() - started,
        tokens=sum(input_tokens(micro) for micro in micros),
        micro_batches=len(micros),
        skipped=skipped,
    )


def backward(
    model: nn.Module,
    micro_batches: Iterable[Micro],
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
    micros = list(micro_batches)
    loss, terms, gradients = accumulate(
        model, micros, loss_fn, counts=count(micros, counters), normalize=normalize
    )
    assign(gradients)
    return loss, terms


def accumulate(
    model: nn.Module,
    micros: list[Micro],
    loss_fn: LossFn,
    *,
    counts: Counts,
    normalize: Unit,
    scaler: GradScaler | None = None,
) -> tuple[float, dict[str, float], dict[nn.Parameter, Tensor]]:
    """Forward and backward of each micro-batch, with every share already normalised.

    Args:
        model: The model.
        micros: The micro-batches of one effective batch; none is run if nothing was counted.
        loss_fn: As for `step`.
        counts: The counts over all of them.
        normalize: As for `step`.
        scaler: As for `step`.

    Returns:
        The objective, each term's total / count, and the gradient of each weight that got one
        (float32 for weights of low precision).

    Raises:
        StepError: As for `step`.
        ConfigError: As for `step`.
    """
    refuse_several_ranks()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if scaler is not None and any(parameter.dtype in LOW_PRECISION for parameter in parameters):
        raise ConfigError(
            "a gradient scaler serves float16 autocast over float32 weights; these weights are of "
            "low precision themselves. Load the model in float32, or leave the scaler out"
        )
    model.zero_grad()
    tally = Tally()
    with float32_accumulation(parameters) as gradients:
        micros = [] if nothing_counted(counts) else micros
        gathered = first_pass(model, micros, loss_fn)
        for index, micro in enumerate(micros):
            loss = gathered.resolve(loss_fn(model, micro), index)
            sums = reduce_terms(loss, micro, normalize=normalize)
            share = objective_share(sums, counts)
            if share is not None:
                (share if scaler is None else scaler.scale(share)).backward()
            tally.add(sums)
        objective, terms = tally.read(counts)
    return objective, terms, gradients


def nothing_counted(counts: Counts) -> bool:
    """Whether the batch was counted and holds nothing to learn from."""
    return bool(counts) and not any(counts.values())


def _refuse_strangers(model: nn.Module, optimizer: Optimizer) -> None:
    own = set(model.parameters())
    strangers = [
        tuple(weight.shape)
        for group in optimizer.param_groups
        for weight in group["params"]
        if weight not in own
    ]
    if strangers:
        raise ConfigError(
            f"the optimizer updates {len(strangers)} weights that are not the model's (shapes "
            f"{strangers[:3]}): the step could neither clear nor clip their gradients. Register "
            "them on the model, or build the optimizer from model.parameters()"
        )


def _not_finite(model: nn.Module, gradients: dict[nn.Parameter, Tensor]) -> StepError:
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter in gradients and not gradients[parameter].isfinite().all()
    ]
    model.zero_grad()
    return StepError(
        f"the step was not taken: the loss is finite but its gradient is not, in {names[0]}"
        + (f" and {len(names) - 1} other weights" if len(names) > 1 else "")
        + ". The weights are unchanged. Usual causes: an overflow in low precision, or a square "
        "root or logarithm at 0"
    )
