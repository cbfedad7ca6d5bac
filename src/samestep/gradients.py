"""Gradients over an effective batch: where they add up, and clipping once at the end."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LOW_PRECISION = (torch.bfloat16, torch.float16)


@contextmanager
def float32_accumulation(
    parameters: Sequence[nn.Parameter],
) -> Iterator[dict[nn.Parameter, Tensor]]:
    """Add the gradients of low-precision weights up in float32.

    In bfloat16 every addition rounds to 8 bits, so the error of ``.grad += new`` grows with the
    number of micro-batches. Here each micro-batch's gradient moves to a float32 sum as soon as
    it is complete. Weights of float32 and above accumulate in ``.grad`` as always.

    Args:
        parameters: The weights. Their ``.grad`` is cleared at the start, and again on an error,
            so that no partial gradient survives.

    Yields:
        A dictionary that holds, after the block, the gradient of each weight that got one:
        float32 for weights of low precision, else ``.grad`` itself.
    """
    gradients: dict[nn.Parameter, Tensor] = {}
    _clear(parameters)
    hooks = [
        parameter.register_post_accumulate_grad_hook(_mover(gradients, parameter))
        for parameter in parameters
        if parameter.dtype in LOW_PRECISION
    ]
    try:
        yield gradients
    except BaseException:
        _clear(parameters)
        raise
    finally:
        for hook in hooks:
            hook.remove()
    gradients.update({weight: weight.grad for weight in parameters if weight.grad is not None})


def _clear(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _mover(
    gradients: dict[nn.Parameter, Tensor], parameter: nn.Parameter
) -> Callable[[Tensor], None]:
    def move(_: Tensor) -> None:
        assert parameter.grad is not None
        if parameter in gradients:
            gradients[parameter].add_(parameter.grad)
        else:
            gradients[parameter] = parameter.grad.float()
        parameter.grad = None

    return move


def clip_(gradients: Sequence[Tensor], max_norm: float | None) -> Tensor:
    """Scale the gradients in place so that their global norm is at most ``max_norm``.

    Args:
        gradients: The normalised gradients of the whole effective batch.
        max_norm: The bound; None only measures.

    Returns:
        The 2-norm over all gradients before clipping, 0-d.
    """
    norm = nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device, gradient.dtype))
    return norm


def assign(gradients: dict[nn.Parameter, Tensor]) -> None:
    """Put gradients where an optimizer looks: ``.grad``, rounded once to the weight's dtype."""
    for parameter, gradient in gradients.items():
        parameter.grad = gradient.to(parameter.dtype)
