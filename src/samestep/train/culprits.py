"""Which rows make a step that is not finite: asked only when there was one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from samestep.engine.counts import count_units
from samestep.engine.oom import describe_rows
from samestep.engine.terms import Counter, LossFn, term_tensors

SHOWN = 10
"""How many rows are named."""


def culprits(
    model: nn.Module,
    micro_batch_of: Callable[[int], dict[str, Any]],
    indices: Sequence[int],
    loss_fn: LossFn,
    *,
    counters: Mapping[str, Counter],
) -> list[str]:
    """The rows whose loss or gradient is not finite, each run by itself.

    Args:
        model: With replicated weights; its gradients are cleared.
        micro_batch_of: The micro-batch of one record.
        indices: The records of this rank.
        loss_fn: The loss.
        counters: As for the step.

    Returns:
        A line a record: its rows, and what is not finite. Empty if none is bad by itself, as when
        an overflow needs all of them together.
    """
    found = []
    for index in indices:
        micro = micro_batch_of(index)
        if not any(count_units([micro], counters).values()):
            continue
        what = _wrong_with(model, micro, loss_fn)
        if what:
            found.append(f"{describe_rows(micro).strip(' ()')}: {what}")
    return found[:SHOWN]


def _wrong_with(model: nn.Module, micro: dict[str, Any], loss_fn: LossFn) -> str:
    """What is not finite about one record: a term, or the gradient; empty if nothing is."""
    model.zero_grad()
    tensors = term_tensors(loss_fn(model, micro))
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            return f"{name} is {float(tensor.detach().sum())}"
    with_graph = [tensor.sum() for tensor in tensors.values() if tensor.requires_grad]
    if with_graph:
        torch.stack([tensor.double() for tensor in with_graph]).sum().backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
    model.zero_grad()
    return "" if finite else "its gradient is not finite"
