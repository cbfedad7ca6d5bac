"""Changes to a batch that must not change the step."""

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from samestep.engine.targets import IGNORE
from samestep.errors import CheckError


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
    short = dict(tensors_of(single))
    for key, tensor in tensors_of(pair):
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
    tensors = dict(tensors_of(batch))
    name, inputs = inputs_of(batch)
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
    _, inputs = inputs_of(batch)
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
    key, inputs = inputs_of(batch)
    changed = inputs.clone()
    for place in where:
        own = inputs[place]
        mirrored = own.min() + own.max() - own
        changed[place] = mirrored.flip(-1) if mirrored.dim() else mirrored
    return _replaced(batch, {key: changed})


def inputs_of(batch: Any) -> tuple[str, Tensor]:
    """The tensor that holds the inputs, and its name: ``input_ids``, or else the first."""
    tensors = tensors_of(batch)
    if not tensors:
        raise CheckError("the batches of this subject hold no tensor that could be changed")
    return ("input_ids", batch["input_ids"]) if has(batch, "input_ids") else tensors[0]


def _replaced(batch: Any, changed: Mapping[str, Tensor]) -> Any:
    """The batch with other tensors under these names."""
    if isinstance(batch, Tensor):
        return next(iter(changed.values()), batch)
    if isinstance(batch, Mapping):
        return like(batch, {**batch, **changed})
    names = {f"batch[{number}]": number for number in range(len(batch))}
    others = {names[key]: tensor for key, tensor in changed.items()}
    return like(batch, [others.get(number, value) for number, value in enumerate(batch)])


def has(batch: Any, key: str) -> bool:
    """Whether a batch is a mapping with this key."""
    return isinstance(batch, Mapping) and key in batch


def tensors_of(batch: Any) -> list[tuple[str, Tensor]]:
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
