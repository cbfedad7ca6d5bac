"""Changes to a batch that must not change the step, and what a batch says of its targets."""

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from samestep.audit.subject import Facts
from samestep.errors import CheckError
from samestep.targets import IGNORE


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """A batch with its floating tensors in a type, of the type of batch that it was."""
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return like(batch, {key: cast(value, dtype) for key, value in batch.items()})
    if isinstance(batch, list | tuple):
        return like(batch, [cast(value, dtype) for value in batch])
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{one.name: cast(getattr(batch, one.name), dtype)
                                 for one in fields(batch)})  # fmt: skip
    return batch


def like(batch: Any, values: Any) -> Any:
    """These values in a batch of the same type: a mapping, a list, a tuple, a named tuple."""
    if type(batch) is dict:
        return values
    if isinstance(batch, Mapping):
        other: Any = copy.copy(batch)
        for key, value in values.items():
            other[key] = value
        return other
    named = isinstance(batch, tuple) and type(batch) is not tuple
    return type(batch)(*values) if named else type(batch)(values)


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
    found = _tensors(single)
    if not found:
        return None
    _, inputs = _inputs(single)
    return inputs.shape[1] if inputs.dim() > 1 and not inputs.is_floating_point() else None


@dataclass(frozen=True)
class Padding:
    """How a collator pads.

    Attributes:
        side: On which side.
        fills: By the name of each tensor that it pads: one padded place.
    """

    side: Literal["right", "left"]
    fills: Mapping[str, Tensor]


def padding_of(single: Any, pair: Any) -> Padding | None:
    """How a collator pads; None if it does not, as far as can be seen.

    Args:
        single: The batch of a short example.
        pair: The batch of a longer example and it, in this order.
    """
    sides: dict[str, Literal["right", "left"]] = {}
    fills = {}
    short = dict(_tensors(single))
    for key, tensor in _tensors(pair):
        own = short.get(key)
        if own is None or own.dim() < 2 or tensor.dim() < 2 or (len(own), len(tensor)) != (1, 2):
            continue
        length, row = own.shape[1], tensor[1]
        if length >= len(row):
            continue
        if bool((row[:length] == own[0]).all()):
            sides[key], fills[key] = "right", row[-1]
        elif bool((row[-length:] == own[0]).all()):
            sides[key], fills[key] = "left", row[0]
    if len(set(sides.values())) != 1:
        return None
    return Padding(next(iter(sides.values())), fills)


def add_padding(
    batch: Any,
    columns: int,
    *,
    side: Literal["right", "left"],
    filler: int = 0,
    fills: Mapping[str, Tensor] | None = None,
) -> Any:
    """A batch of rows with more columns of padding.

    Args:
        batch: A mapping or a sequence of tensors [rows, length, ...].
        columns: How many to add.
        side: Where.
        filler: Added to the token id that pads the inputs.
        fills: What pads each tensor, by name; None: ids with 0, labels with ``IGNORE``, the rest
            that has the shape of ``input_ids`` with 0.
    """
    tensors = dict(_tensors(batch))
    name, inputs = _inputs(batch)
    if fills is None:
        alike = {key: one for key, one in tensors.items() if one.shape[:2] == inputs.shape[:2]}
        fills = {
            key: one.new_full(one.shape[2:], IGNORE if key == "labels" else 0)
            for key, one in alike.items()
            if one.dim() >= 2
        }
    padded = {}
    for key, fill in fills.items():
        value = tensors[key]
        extra = fill.to(value.dtype) + (filler if key == name else 0)
        added = extra.expand(value.shape[0], columns, *value.shape[2:])
        padded[key] = torch.cat([value, added] if side == "right" else [added, value], dim=1)
    return _replaced(batch, padded)


Place: TypeAlias = tuple[int | slice, ...]
"""Where an example lies in the tensors of a batch: a row, or a stretch of the only row."""


def places(
    batch: Any, lengths: Sequence[int | None], side: Literal["right", "left"] = "right"
) -> list[Place]:
    """Where each example lies.

    Args:
        batch: Of these examples, in this order.
        lengths: Of each example by itself, from `length_of`.
        side: Of the padding.

    Raises:
        CheckError: Neither a row each, nor all side by side in one row.
    """
    _, inputs = _inputs(batch)
    known = [length for length in lengths if length is not None]
    if inputs.shape[0] == len(lengths):
        stretches = [
            () if one is None else (slice(0, one) if side == "right" else slice(-one, None),)
            for one in lengths
        ]
        return [(row, *stretch) for row, stretch in enumerate(stretches)]
    if inputs.shape[0] == 1 and inputs.dim() > 1 and inputs.shape[1] == sum(known):
        ends = list(itertools.accumulate(known))
        return [(0, slice(end - one, end)) for end, one in zip(ends, known, strict=True)]
    raise CheckError("the examples of a batch of this subject cannot be told apart")


def mask_targets(batch: Any, where: Sequence[Place]) -> Any:
    """A batch in which some examples have no target.

    Raises:
        CheckError: The labels are no classes.
    """
    labels = batch["labels"].clone()
    if labels.is_floating_point():
        raise CheckError("labels that are no classes cannot be masked")
    for row, *stretch in where:
        labels[(row, *stretch) if labels.shape[0] == 1 and labels.dim() > 1 else row] = IGNORE
    return like(batch, {**batch, "labels": labels})


def mask_borders(batch: Any, where: Sequence[Place]) -> Any:
    """A pack in which the first token of no sequence is a target."""
    labels = batch["labels"].clone()
    for place in where:
        labels[place].view(-1)[0] = IGNORE
    return like(batch, {**batch, "labels": labels})


def alter(batch: Any, where: Sequence[Place]) -> Any:
    """A batch in which the inputs of some examples are others, within the same range of values.

    The inputs are ``input_ids``, or else the first tensor of the batch. They are mirrored in value
    and along the last axis: models that only add up would not see a new order.

    Raises:
        CheckError: There is no tensor.
    """
    key, inputs = _inputs(batch)
    changed = inputs.clone()
    for place in where:
        own = inputs[place]
        mirrored = own.min() + own.max() - own
        changed[place] = mirrored.flip(-1) if mirrored.dim() else mirrored
    return _replaced(batch, {key: changed})


def _inputs(batch: Any) -> tuple[str, Tensor]:
    tensors = _tensors(batch)
    if not tensors:
        raise CheckError("the batches of this subject hold no tensor that could be changed")
    return ("input_ids", batch["input_ids"]) if _has(batch, "input_ids") else tensors[0]


def _replaced(batch: Any, changed: Mapping[str, Tensor]) -> Any:
    """The batch with other tensors under these names."""
    if isinstance(batch, Tensor):
        return next(iter(changed.values()), batch)
    if isinstance(batch, Mapping):
        return like(batch, {**batch, **changed})
    names = {f"batch[{number}]": number for number in range(len(batch))}
    others = {names[key]: tensor for key, tensor in changed.items()}
    return like(batch, [others.get(number, value) for number, value in enumerate(batch)])


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
