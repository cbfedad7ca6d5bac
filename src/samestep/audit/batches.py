"""Changes to a batch that must not change the step, and what a batch says of its targets."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from samestep.audit.subject import Facts
from samestep.errors import CheckError
from samestep.targets import IGNORE


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """A batch with its floating tensors in a type."""
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: cast(value, dtype) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(cast(value, dtype) for value in batch)
    return batch


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


def length_of(single: Any) -> int:
    """Tokens of the batch of one example; 1 where it has none."""
    ids = single.get("input_ids") if isinstance(single, Mapping) else None
    return ids.shape[-1] if isinstance(ids, Tensor) and ids.dim() else 1


def add_padding(
    batch: Any, columns: int, *, side: Literal["right", "left"], filler: int = 0
) -> Any:
    """A batch of [rows, length] tensors with more columns of padding.

    Token ids are padded with the filler, labels with ``IGNORE``, the rest with 0.
    """
    fills = {"labels": IGNORE, "input_ids": filler}
    ids = batch["input_ids"]
    padded = dict(batch)
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.shape[:2] == ids.shape[:2] and value.dim() >= 2:
            fill = value.new_full((value.shape[0], columns, *value.shape[2:]), fills.get(key, 0))
            padded[key] = torch.cat([value, fill] if side == "right" else [fill, value], dim=1)
    return padded


Place: TypeAlias = tuple[int | slice, ...]
"""Where an example lies in the tensors of a batch: a row, or a stretch of the only row."""


def places(batch: Any, lengths: Sequence[int]) -> list[Place]:
    """Where each example lies.

    Args:
        batch: Of these examples, in this order.
        lengths: Of each example by itself.

    Raises:
        CheckError: Neither a row each, nor all side by side in one row.
    """
    _, tensor = _tensors(batch)[0] if not _has(batch, "input_ids") else ("", batch["input_ids"])
    if tensor.shape[0] == len(lengths):
        return [(row,) for row in range(len(lengths))]
    if tensor.dim() > 1 and tensor.shape[0] == 1 and tensor.shape[1] == sum(lengths):
        ends = list(itertools.accumulate(lengths))
        return [(0, slice(end - one, end)) for end, one in zip(ends, lengths, strict=True)]
    raise CheckError("the examples of this batch cannot be told apart")


def mask_targets(batch: Any, where: Sequence[Place]) -> Any:
    """A batch in which some examples have no target."""
    labels = batch["labels"].clone()
    if labels.is_floating_point():
        raise CheckError("labels that are no classes cannot be masked")
    for place in where:
        labels[place] = IGNORE
    return {**batch, "labels": labels}


def mask_borders(batch: Any, where: Sequence[Place]) -> Any:
    """A pack in which the first token of no sequence is a target."""
    labels = batch["labels"].clone()
    for place in where:
        labels[place].view(-1)[0] = IGNORE
    return {**batch, "labels": labels}


def alter(batch: Any, where: Sequence[Place]) -> Any:
    """A batch in which the inputs of some examples are others (their last axis is reversed).

    The inputs are ``input_ids``, or else the first tensor of the batch.

    Raises:
        CheckError: There is no tensor.
    """
    tensors = _tensors(batch)
    if not tensors:
        raise CheckError("a batch without tensors cannot be altered")
    key, inputs = ("input_ids", batch["input_ids"]) if _has(batch, "input_ids") else tensors[0]
    changed = inputs.clone()
    for place in where:
        changed[place] = changed[place].flip(-1) if changed[place].dim() else changed[place]
    if isinstance(batch, Tensor):
        return changed
    if isinstance(batch, Mapping):
        return {**batch, key: changed}
    return type(batch)(changed if value is inputs else value for value in batch)


def counts_of(batch: Any) -> dict[str, tuple[str, float]]:
    """Everything that a loop could divide a batch by, and the cause that it is if it does.

    Args:
        batch: A mapping, a sequence or a tensor.

    Returns:
        By what is counted: the name of the cause, and the count.
    """
    found: dict[str, tuple[str, float]] = {}
    labels = batch["labels"] if _has(batch, "labels") else None
    if isinstance(labels, Tensor) and labels.dim() > 1 and not labels.is_floating_point():
        found["labels"] = "unshifted-count", float((labels != IGNORE).sum())
    for key, tensor in _tensors(batch):
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


def own_side(single: Any, pair: Any) -> Literal["right", "left"]:
    """The side on which a collator pads.

    Args:
        single: The batch of one example, a mapping with ``input_ids``.
        pair: The batch of a longer example and it, in this order.
    """
    ids, row = single["input_ids"][0], pair["input_ids"][1]
    at_the_start = bool((row[: len(ids)] == ids).all())
    at_the_end = bool((row[-len(ids) :] == ids).all())
    return "left" if at_the_end and not at_the_start else "right"


def _has(batch: Any, key: str) -> bool:
    return isinstance(batch, Mapping) and key in batch


def _tensors(batch: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a batch by name; those of a sequence by number."""
    if isinstance(batch, Tensor):
        return [("batch", batch)]
    if isinstance(batch, Mapping):
        pairs = [(str(key), value) for key, value in batch.items()]
    elif isinstance(batch, list | tuple):
        pairs = [(f"batch[{number}]", value) for number, value in enumerate(batch)]
    else:
        return []
    return [(key, value) for key, value in pairs if isinstance(value, Tensor)]
