"""Changes to a batch that must not change the step, and what a batch says of its targets."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from samestep.audit.subject import Facts
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


def mask_targets(batch: Any, rows: Sequence[int]) -> Any:
    """A batch in which some rows have no target."""
    labels = batch["labels"].clone()
    if labels.is_floating_point():
        return batch
    labels[list(rows)] = IGNORE
    return {**batch, "labels": labels}


def alter(batch: Any, rows: Sequence[int]) -> Any:
    """A batch in which the tokens of some rows are others (each is rolled by one position)."""
    ids = batch["input_ids"].clone()
    ids[list(rows)] = ids[list(rows)].flip(-1)
    return {**batch, "input_ids": ids}
