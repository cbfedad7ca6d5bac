"""Gradients over an effective batch: where they add up, over ranks too, and clipping at the end."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

LOW_PRECISION_DTYPES = (torch.bfloat16, torch.float16)

BUCKET_ELEMENTS = 2**25
"""Elements that one all-reduce of gradients carries, at most (128 MB in float32)."""


@contextmanager
def float32_accumulation(
    parameters: Sequence[nn.Parameter],
) -> Iterator[dict[nn.Parameter, Tensor]]:
    """Add up the gradients of low-precision weights in float32.

    In bfloat16 every addition rounds to 8 bits, so the error of ``.grad += new`` grows with the
    number of micro-batches. Here each micro-batch's gradient moves to a float32 sum as soon as
    it is complete. Weights of float32 and above accumulate in ``.grad`` as always.

    Args:
        parameters: The weights that train. Their ``.grad`` is cleared at the start, and again on an
            error, so that no partial gradient survives.

    Yields:
        A dictionary that holds, after the block, the gradient of each weight that got one:
        float32 for weights of low precision, else ``.grad`` itself.
    """
    gradients: dict[nn.Parameter, Tensor] = {}
    _clear(parameters)
    hooks = [
        parameter.register_post_accumulate_grad_hook(_float32_hook(parameter, gradients))
        for parameter in parameters
        if parameter.dtype in LOW_PRECISION_DTYPES
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


def _float32_hook(
    parameter: nn.Parameter, gradients: dict[nn.Parameter, Tensor]
) -> Callable[[Tensor], None]:
    def move_to_float32_sum(_: Tensor) -> None:
        assert parameter.grad is not None
        if parameter in gradients:
            gradients[parameter].add_(parameter.grad)
        else:
            gradients[parameter] = parameter.grad.float()
        parameter.grad = None

    return move_to_float32_sum


def params_without_grad(
    parameters: Sequence[nn.Parameter], gradients: Mapping[nn.Parameter, Tensor]
) -> list[int]:
    """Which weights no backward has reached.

    Args:
        parameters: The weights that train.
        gradients: What `float32_accumulation` yields.

    Returns:
        Their positions among the parameters.
    """
    return [
        position
        for position, weight in enumerate(parameters)
        if weight.grad is None and weight not in gradients
    ]


def sum_over_replicas(
    gradients: dict[nn.Parameter, Tensor],
    parameters: Sequence[nn.Parameter],
    *,
    without_grad_by_rank: Sequence[Sequence[int]],
) -> None:
    """Add up the gradients of replicated weights over the ranks, in place.

    Args:
        gradients: This rank's gradients; zeros are added for those that only other ranks have.
        parameters: The weights that train, in the same order on every rank.
        without_grad_by_rank: `params_without_grad` of each rank. A weight that no backward of any
            rank has reached gets no gradient.
    """
    if len(without_grad_by_rank) < 2:
        return
    unreached = set.intersection(*map(set, without_grad_by_rank))
    reached = [weight for i, weight in enumerate(parameters) if i not in unreached]
    for weight in reached:
        if weight not in gradients:
            dtype = torch.float32 if weight.dtype in LOW_PRECISION_DTYPES else weight.dtype
            gradients[weight] = torch.zeros_like(weight, dtype=dtype)
    for bucket in _buckets([gradients[weight] for weight in reached]):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        sums = flat.split([gradient.numel() for gradient in bucket])
        for gradient, total in zip(bucket, sums, strict=True):
            gradient.copy_(total.view_as(gradient))


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one dtype and device, up to `BUCKET_ELEMENTS` elements together."""
    buckets: list[list[Tensor]] = []
    free, bucket_type = 0, None
    for gradient in gradients:
        gradient_type = (gradient.dtype, gradient.device)
        if gradient.numel() > free or gradient_type != bucket_type:
            buckets.append([])
            free, bucket_type = BUCKET_ELEMENTS, gradient_type
        buckets[-1].append(gradient)
        free -= gradient.numel()
    return buckets


def clip_grad_norm_(gradients: Sequence[Tensor], max_norm: float | None) -> Tensor:
    """Scale the gradients in place so that their global norm is at most ``max_norm``.

    Args:
        gradients: The normalised gradients of the whole effective batch; of sharded weights,
            this rank's shards (DTensor).
        max_norm: The bound; None only measures.

    Returns:
        The 2-norm over all gradients before clipping, 0-d, the same on every rank.
    """
    norm = nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for gradient in gradients:
            groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
        for (device, dtype), group in groups.items():
            torch._foreach_mul_(group, factor.to(device, dtype))  # on a GPU few kernels for all
    return norm


def is_finite(gradient: Tensor) -> bool:
    """Whether every element of a gradient is finite; of a sharded one, over all shards."""
    finite = gradient.isfinite().all()
    return bool(finite.full_tensor() if isinstance(finite, DTensor) else finite)


def assign_gradients(gradients: dict[nn.Parameter, Tensor]) -> None:
    """Put gradients where an optimizer looks: ``.grad``, rounded once to the weight's dtype.

    Args:
        gradients: The gradient of each weight that got one; empty afterwards, so that sums in
            float32 are gone, one after another, before the optimizer runs.
    """
    for parameter in list(gradients):
        parameter.grad = gradients.pop(parameter).to(parameter.dtype)
