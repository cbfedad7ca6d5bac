"""What the step refuses, because it could not be exact or must not be silent."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from samestep.engine.gradients import LOW_PRECISION_DTYPES, is_finite
from samestep.engine.parallel import is_sharded
from samestep.errors import ConfigError, NotFiniteError


def check_optimizer_params(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse an optimizer over weights that are not the model's.

    Args:
        model: The model that the step differentiates.
        optimizer: The optimizer that the step updates it with.

    Raises:
        ConfigError: There are such weights.
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
        gradients: The gradients of the step, of which one at least is not finite.

    Returns:
        The error to raise.
    """
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter in gradients and not is_finite(gradients[parameter])
    ]
    model.zero_grad()
    return NotFiniteError(
        f"the step was not taken: the loss is finite but its gradient is not, in {names[0]}"
        + (f" and {len(names) - 1} other weights" if len(names) > 1 else "")
        + ". The weights are unchanged. Usual causes: an overflow in low precision, or a square "
        "root or logarithm at 0"
    )
