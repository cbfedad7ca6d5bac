"""What a batch says of its targets, and what a loop could count it by."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from samestep.audit.batches import has, inputs_of, tensors_of
from samestep.audit.subject import Facts
from samestep.engine.targets import IGNORE


def facts_of(batches: Sequence[Any]) -> list[Facts] | None:
    """What each example's own batch says; None unless all are mappings with tensor ``labels``."""
    facts = []
    for batch in batches:
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor):
            return None
        ids = batch.get("input_ids")
        length = ids.shape[-1] if isinstance(ids, Tensor) else labels.numel()
        real = torch.ones_like(labels, dtype=torch.bool)
        if labels.dim() >= 2:
            valid = labels != IGNORE
            mask = batch.get("attention_mask")
            if isinstance(mask, Tensor) and mask.shape == labels.shape:
                real, length = mask.bool(), int(mask.sum())
            facts.append(Facts(int((valid & real)[:, 1:].sum()), int((valid & real).sum()), length))
        else:
            count = int((labels != IGNORE).sum())
            facts.append(Facts(count, count, length))
    return facts


def length_of(single: Any) -> int | None:
    """Tokens of the batch of one example; None where its inputs are no rows of tokens."""
    found = tensors_of(single)
    if not found:
        return None
    _, inputs = inputs_of(single)
    return inputs.shape[1] if inputs.dim() > 1 and not inputs.is_floating_point() else None


def counts_of(batch: Any) -> dict[str, tuple[str, float]]:
    """Everything that a loop could divide a batch by, and the cause that it is if it does.

    Args:
        batch: A mapping, a sequence or a tensor.

    Returns:
        By what is counted: the name of the cause, and the count.
    """
    found: dict[str, tuple[str, float]] = {}
    labels = batch["labels"] if has(batch, "labels") else None
    if isinstance(labels, Tensor) and labels.dim() > 1 and not labels.is_floating_point():
        found["labels"] = "unshifted-count", float((labels != IGNORE).sum())
    for key, tensor in tensors_of(batch):
        if not tensor.dim():
            continue
        layout = isinstance(labels, Tensor) and tensor.shape == labels.shape and tensor.dim() > 1
        if tensor.dim() > 1:
            found[f"elements of {key}"] = "padding-counted", float(tensor.numel())
            elements = float(tensor[:, 1:].numel())
            found[f"elements of {key}[:, 1:]"] = "padding-counted", elements
        if not tensor.is_floating_point():
            # Tokens that are real but no targets, such as a prompt's, or any other unit.
            cause = "padding-counted" if layout else "example-weighted"
            found[f"non-zeros of {key}"] = cause, float((tensor != 0).sum())
        if not tensor.is_floating_point() and bool((tensor == IGNORE).any()):
            found[f"labels of {key}"] = "example-weighted", float((tensor != IGNORE).sum())
        found[f"sum of {key}"] = "example-weighted", float(tensor.sum())
    return found
