"""What the step refuses, because it could not be exact or must not be silent."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from samestep.engine.gradients import LOW_PRECISION_DTYPES, is_finite
from samestep.engine.normalize import TermTotals
from samestep.engine.parallel import is_sharded
from samestep.engine.terms import MicroBatch
from samestep.errors import ConfigError, DataError, NotFiniteError, StepError


def check_micro_batches(micro_batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
    """Refuse what is no iterable of micro-batches, before anything is taken from it.

    Args:
        micro_batches: What the caller gave as the micro-batches.

    Returns:
        An iterator over them.

    Raises:
        ConfigError: It is one micro-batch, text, or nothing that can be iterated.
    """
    if isinstance(micro_batches, Mapping):
        names = ", ".join(map(repr, list(micro_batches)[:5]))
        raise ConfigError(
            f"micro_batches is one mapping (of {names}): pass a list of micro-batches. For a batch "
            "of one micro-batch wrap it: [micro_batch]"
        )
    if isinstance(micro_batches, Tensor):
        raise ConfigError(
            f"micro_batches is one tensor {tuple(micro_batches.shape)}, of which each row would be "
            "a micro-batch: pass a list of micro-batches, such as [tensor] or tensor.split(size)"
        )
    if isinstance(micro_batches, str | bytes) or not hasattr(micro_batches, "__iter__"):
        raise ConfigError(
            f"micro_batches is {micro_batches!r:.80} ({type(micro_batches).__name__}): pass a list "
            "(or another iterable) of micro-batches"
        )
    return iter(micro_batches)


def no_micro_batch_error(micro_batches: Iterable[MicroBatch]) -> DataError:
    """The error for an effective batch without a single micro-batch, on any rank.

    Args:
        micro_batches: What the caller gave.

    Returns:
        The error to raise.
    """
    reason = "micro_batches is empty"
    if inspect.isgenerator(micro_batches) or isinstance(micro_batches, Iterator):
        kind = type(micro_batches).__name__
        reason = (
            f"micro_batches is a {kind} that gave nothing: it is used up (one can be read once "
            "only; make a new one for each step) or was empty from the start"
        )
    return DataError(
        f"there is no micro-batch in this step: {reason}. Nothing was trained; leave out the step, "
        "or give it a list with at least one micro-batch (with several ranks: on one of them)"
    )


def check_trains(model: nn.Module, weights: Sequence[nn.Parameter]) -> None:
    """Refuse a model of which no weight trains.

    Args:
        model: The model.
        weights: Those of its weights that train.

    Raises:
        ConfigError: There are none.
    """
    if weights:
        return
    frozen = sum(1 for _ in model.parameters())
    found = f"all {frozen} are frozen (requires_grad is False)" if frozen else "it has none"
    raise ConfigError(
        f"no weight of {type(model).__name__} trains: {found}, so the step could change nothing. "
        "Set requires_grad on those that are to train, before the optimizer is built"
    )


def check_terms_reach_weights(
    totals_by_rank: Sequence[TermTotals],
    without_grad_by_rank: Sequence[Sequence[int]],
    *,
    num_weights: int,
) -> None:
    """Refuse terms that are reported as optimised, but of which no weight can learn.

    Args:
        totals_by_rank: `samestep.engine.normalize.TermAccumulator.totals` of every rank.
        without_grad_by_rank: `samestep.engine.gradients.params_without_grad` of every rank.
        num_weights: How many weights train.

    Raises:
        StepError: A term with a weight has a total but no graph in any micro-batch, or no backward
            has reached any weight.
    """
    optimised: dict[str, list[bool]] = {}
    for totals in totals_by_rank:
        for name, term in totals.items():
            if term["weight"] != 0 and any(term["total"]):
                optimised.setdefault(name, []).append(term["graph"])
    detached = [repr(name) for name, graphs in optimised.items() if not any(graphs)]
    if detached:
        raise StepError(
            f"the step was not taken: term {' and '.join(detached)} has no graph in any "
            "micro-batch, so no weight can learn from it: it was detached, made under "
            "torch.no_grad(), read back as a number, or depends on no weight that trains. A "
            "number that is only to be reported gets weight=0. The weights are unchanged"
        )
    unreached = set.intersection(*map(set, without_grad_by_rank))
    if optimised and len(unreached) == num_weights:
        raise StepError(
            f"the step was not taken: term {' and '.join(map(repr, optimised))} depends on none of "
            f"the {num_weights} weights that train: its gradient reaches other tensors only. "
            "Compute it from the model that the loss is given. The weights are unchanged"
        )
    names = {name for totals in totals_by_rank for name in totals}
    weighted = any(term["weight"] for totals in totals_by_rank for term in totals.values())
    if names and not weighted:
        raise StepError(
            f"the step was not taken: every term ({', '.join(map(repr, sorted(names)))}) has "
            "weight 0, so there is nothing to optimise. Use samestep.evaluate to report alone"
        )


def check_optimizer_params(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse an optimizer over weights that are not the model's.

    Args:
        model: The model that the step differentiates.
        optimizer: The optimizer that the step updates it with.

    Raises:
        ConfigError: There are such weights, or none of the optimizer's weights trains.
    """
    parameters = set(model.parameters())
    foreign = [
        tuple(weight.shape)
        for group in optimizer.param_groups
        for weight in group["params"]
        if weight not in parameters
    ]
    if foreign:
        raise ConfigError(
            f"the optimizer updates {len(foreign)} weights that are not the model's (shapes "
            f"{foreign[:3]}): the step could neither clear nor clip their gradients. Register "
            "them on the model, or build the optimizer from model.parameters(), after fully_shard"
        )
    held = [weight for group in optimizer.param_groups for weight in group["params"]]
    if not any(weight.requires_grad for weight in held):
        raise ConfigError(
            f"none of the {len(held)} weights that the optimizer holds trains (requires_grad is "
            "False, or it holds none): the step could change nothing. Build it from the weights "
            "that train: [w for w in model.parameters() if w.requires_grad]"
        )


def check_scaler(
    model: nn.Module, parameters: Sequence[nn.Parameter], *, scaler: GradScaler | None
) -> None:
    """Refuse a gradient scaler where it cannot work.

    Args:
        model: The model.
        parameters: Its weights that train.
        scaler: The scaler, or None.

    Raises:
        ConfigError: The weights are of low precision, or lie in shards.
    """
    if scaler is None:
        return
    if any(parameter.dtype in LOW_PRECISION_DTYPES for parameter in parameters):
        raise ConfigError(
            "a gradient scaler serves float16 autocast over float32 weights; these weights are of "
            "low precision themselves. Load the model in float32, or leave the scaler out"
        )
    if is_sharded(model):
        raise ConfigError(
            "a gradient scaler sees only its own rank's shards, so ranks would disagree on an "
            "overflow: under fully_shard use bfloat16, which needs no scaler"
        )


def nonfinite_gradient_error(
    model: nn.Module, gradients: Mapping[nn.Parameter, Tensor]
) -> NotFiniteError:
    """Clear the gradients, and name the weights whose gradient is not finite.

    Args:
        model: The model; its ``.grad`` are cleared.
        gradients: The gradients of the step, of which one at least is not finite, or whose norm
            is not.

    Returns:
        The error to raise.
    """
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter in gradients and not is_finite(gradients[parameter])
    ]
    if not names:
        largest = {
            name: float(gradients[parameter].abs().max())
            for name, parameter in model.named_parameters()
            if parameter in gradients and parameter.numel()
        }
        model.zero_grad()
        name = max(largest, key=largest.__getitem__)
        return NotFiniteError(
            "the step was not taken: every element of the gradient is finite, but their norm "
            f"overflows; the largest, {largest[name]:.3g}, is in {name}. The weights are "
            "unchanged. Usual causes: a term's weight, or inputs, that are far too large"
        )
    model.zero_grad()
    return NotFiniteError(
        f"the step was not taken: the loss is finite but its gradient is not, in {names[0]}"
        + (f" and {len(names) - 1} other weights" if len(names) > 1 else "")
        + ". The weights are unchanged. Usual causes: an overflow in low precision, or a square "
        "root or logarithm at 0"
    )
