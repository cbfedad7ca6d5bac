"""Batches: changes that must not change the step, and what a loop could count in them."""

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from samestep.audit.subject import Denominator, ExampleCounts, Side
from samestep.engine.targets import IGNORE
from samestep.errors import CheckError


def copied(value: Any) -> Any:
    """A deep copy; of tensors in plain containers many times as fast as ``copy.deepcopy``."""
    kind = type(value)
    if kind is Tensor and value.layout == torch.strided and not value.requires_grad:
        return value.clone()
    if kind is dict:
        return {key: copied(each) for key, each in value.items()}
    if kind is list or kind is tuple:
        return kind(map(copied, value))
    return copy.deepcopy(value)


def cast_floats(batch: Any, dtype: torch.dtype) -> Any:
    """A batch with its floating tensors in a type, of the type of batch that it was."""
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return _rebuild(batch, {key: cast_floats(value, dtype) for key, value in batch.items()})
    if isinstance(batch, list | tuple):
        return _rebuild(batch, [cast_floats(value, dtype) for value in batch])
    if is_dataclass(batch) and not isinstance(batch, type):
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        return replace(batch, **{name: cast_floats(value, dtype) for name, value in values.items()})
    return batch


def _rebuild(batch: Any, values: Any) -> Any:
    """These values in a batch of the same type: a mapping, a list, a tuple, a named tuple."""
    if type(batch) is dict:
        return values
    if isinstance(batch, Mapping):
        rebuilt: Any = copy.copy(batch)
        for key, value in values.items():
            rebuilt[key] = value
        return rebuilt
    named = isinstance(batch, tuple) and type(batch) is not tuple
    return type(batch)(*values) if named else type(batch)(values)


@dataclass(frozen=True)
class CollatorPadding:
    """How a collator pads.

    Attributes:
        side: On which side.
        fills: By the name of each tensor that it pads: one padded place.
    """

    side: Side
    fills: Mapping[str, Tensor]


def infer_padding(single: Any, pair: Any) -> CollatorPadding | None:
    """How a collator pads; None if it does not, as far as can be seen.

    Args:
        single: The batch of a short example.
        pair: The batch of a longer example and it, in this order.
    """
    sides: dict[str, Side] = {}
    fills = {}
    short = dict(_tensors_of(single))
    for key, tensor in _tensors_of(pair):
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
    return CollatorPadding(next(iter(sides.values())), fills)


def add_padding(
    batch: Any,
    columns: int,
    *,
    side: Side,
    offset: int = 0,
    fills: Mapping[str, Tensor] | None = None,
) -> Any:
    """A batch of rows with more columns of padding.

    Args:
        batch: A mapping or a sequence of tensors [rows, length, ...].
        columns: How many to add.
        side: Where.
        offset: Added to the token id that pads the inputs.
        fills: What pads each tensor, by name; None: ids with 0, labels with ``IGNORE``, the rest
            that has the shape of ``input_ids`` with 0.
    """
    tensors = dict(_tensors_of(batch))
    name, inputs = _inputs_of(batch)
    if fills is None:
        fills = {
            key: tensor.new_full(tensor.shape[2:], IGNORE if key == "labels" else 0)
            for key, tensor in tensors.items()
            if tensor.dim() >= 2 and tensor.shape[:2] == inputs.shape[:2]
        }
    padded = {}
    for key, fill in fills.items():
        value = tensors[key]
        extra = fill.to(value.dtype) + (offset if key == name else 0)
        added = extra.expand(value.shape[0], columns, *value.shape[2:])
        padded[key] = torch.cat([value, added] if side == "right" else [added, value], dim=1)
    return _replaced(batch, padded)


Location: TypeAlias = tuple[int | slice, ...]
"""Where an example lies in a batch: a row, a stretch of the only row, or several rows."""


def locate_examples(
    batch: Any,
    lengths: Sequence[int | None],
    *,
    side: Side = "right",
    rows: Sequence[int | None] = (),
) -> list[Location]:
    """Where each example lies.

    Args:
        batch: Of these examples, in this order.
        lengths: Of each example by itself, from `token_length`.
        side: Of the padding.
        rows: Of each example by itself, from `number_of_rows`.

    Raises:
        CheckError: Neither a row each, nor the rows of each in turn, nor all in one row.
    """
    _, inputs = _inputs_of(batch)
    tokens = [length for length in lengths if length is not None]
    if inputs.shape[0] == len(lengths):
        return [
            (row,)
            if length is None
            else (row, slice(0, length) if side == "right" else slice(-length, None))
            for row, length in enumerate(lengths)
        ]
    if inputs.shape[0] == 1 and inputs.dim() > 1 and inputs.shape[1] == sum(tokens):
        ends = itertools.accumulate(tokens)
        return [(0, slice(end - n, end)) for end, n in zip(ends, tokens, strict=True)]
    own = [number for number in rows if number is not None]
    if len(own) == len(lengths) and inputs.shape[0] == sum(own):
        return [
            (slice(end - n, end),) for end, n in zip(itertools.accumulate(own), own, strict=True)
        ]
    raise CheckError("the examples of a batch of this subject cannot be told apart")


def real_tokens(batch: Any, row: int, *, padding: CollatorPadding | None) -> Location:
    """The stretch of a row that is no padding, whatever its neighbours made of the row's length.

    Args:
        batch: Of rows; what its ``attention_mask`` (``chosen_attention_mask`` of
            ``chosen_input_ids``) leaves out is padding.
        row: Which.
        padding: How the collator pads, if that could be seen: tokens at the ends like it are left.
    """
    name, inputs = _inputs_of(batch)
    of_inputs = (
        name.replace("input_ids", "attention_mask") if "input_ids" in name else "attention_mask"
    )
    mask = batch.get(of_inputs) if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == inputs.shape[:2]:
        held = mask[row] != 0
    elif padding is not None and name in padding.fills and inputs.dim() == 2:
        held = inputs[row] != padding.fills[name]
    else:
        return (row,)
    places = held.nonzero().flatten().tolist()
    return (row, slice(places[0], places[-1] + 1)) if places else (row,)


def mask_targets(batch: Any, locations: Sequence[Location]) -> Any:
    """A batch in which some examples have no target.

    Raises:
        CheckError: The labels are no classes, or not in the rows of the inputs.
    """
    labels = batch["labels"].clone()
    if labels.is_floating_point():
        raise CheckError("labels that are no classes cannot be masked")
    several = any(isinstance(location[0], slice) for location in locations)
    if several and labels.shape[:1] != _inputs_of(batch)[1].shape[:1]:
        raise CheckError("the labels of an example with several rows cannot be told apart")
    for row, *stretch in locations:
        labels[(row, *stretch) if labels.shape[0] == 1 and labels.dim() > 1 else row] = IGNORE
    return _rebuild(batch, {**batch, "labels": labels})


def mask_boundaries(batch: Any, locations: Sequence[Location]) -> Any:
    """A pack in which the first token of no sequence is a target."""
    labels = batch["labels"].clone()
    for location in locations:
        labels[location].view(-1)[0] = IGNORE
    return _rebuild(batch, {**batch, "labels": labels})


def alter_inputs(batch: Any, locations: Sequence[Location]) -> Any:
    """A batch in which the inputs of some examples are others, within the same range of values.

    The inputs are ``input_ids``, or else the first tensor of the batch. They are mirrored in value
    and along the last axis: models that only add up would not see a new order.

    Raises:
        CheckError: There is no tensor.
    """
    key, inputs = _inputs_of(batch)
    changed = inputs.clone()
    for location in locations:
        own = inputs[location]
        mirrored = own.min() + own.max() - own
        changed[location] = mirrored.flip(-1) if mirrored.dim() else mirrored
    return _replaced(batch, {key: changed})


def _inputs_of(batch: Any) -> tuple[str, Tensor]:
    """The tensor that holds the inputs, and its name: ``input_ids``, or else the first."""
    tensors = _tensors_of(batch)
    if not tensors:
        raise CheckError("the batches of this subject hold no tensor that could be changed")
    return ("input_ids", batch["input_ids"]) if _has_key(batch, "input_ids") else tensors[0]


def _replaced(batch: Any, changed: Mapping[str, Tensor]) -> Any:
    """The batch with other tensors under these names."""
    if isinstance(batch, Tensor):
        return next(iter(changed.values()), batch)
    if isinstance(batch, Mapping):
        return _rebuild(batch, {**batch, **changed})
    names = {f"batch[{number}]": number for number in range(len(batch))}
    by_number = {names[key]: tensor for key, tensor in changed.items()}
    return _rebuild(batch, [by_number.get(number, value) for number, value in enumerate(batch)])


def _has_key(batch: Any, key: str) -> bool:
    """Whether a batch is a mapping with this key."""
    return isinstance(batch, Mapping) and key in batch


def _tensors_of(batch: Any) -> list[tuple[str, Tensor]]:
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


def count_examples(
    batches: Sequence[Any], *, shifts: bool = True, padding_counts: bool = False
) -> list[ExampleCounts] | None:
    """What each example's own batch says; None unless all are mappings with tensor ``labels``.

    Args:
        batches: Of one example each.
        shifts: Whether rows of labels are predicted from the position before.
        padding_counts: Whether a label counts although the attention mask calls it padding.
    """
    counts = []
    for batch in batches:
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor):
            return None
        valid = labels != IGNORE
        mask = batch.get("attention_mask")
        masked = isinstance(mask, Tensor) and mask.shape == labels.shape and labels.dim() > 1
        if masked and not padding_counts:
            valid &= mask.bool()
        if shifts and labels.dim() > 1:
            valid = valid[:, 1:]
        ids = batch.get("input_ids")
        length = ids.numel() if isinstance(ids, Tensor) else labels.numel()
        counts.append(ExampleCounts(int(valid.sum()), length))
    return counts


def token_length(single: Any) -> int | None:
    """Tokens of the batch of one example; None where its inputs are no rows of tokens."""
    if not _tensors_of(single):
        return None
    _, inputs = _inputs_of(single)
    return inputs.shape[1] if inputs.dim() > 1 and not inputs.is_floating_point() else None


def number_of_rows(single: Any) -> int | None:
    """Rows of the batch of one example, where they are the first dimension of its inputs."""
    if not _tensors_of(single):
        return None
    _, inputs = _inputs_of(single)
    return inputs.shape[0] if inputs.dim() else None


def rows_and_width(batch: Any) -> tuple[int, int] | None:
    """Of the inputs of a batch; None where they have no two dimensions."""
    if not _tensors_of(batch):
        return None
    _, inputs = _inputs_of(batch)
    return (inputs.shape[0], inputs.shape[1]) if inputs.dim() > 1 else None


def unpadded_of(singles: Sequence[Any], whole: Any) -> frozenset[str]:
    """Names of tensors that hold the rows of every example one after another, and nothing else.

    Args:
        singles: The batch of each example by itself.
        whole: That of all.
    """
    names = []
    for key, tensor in _tensors_of(whole):
        own = [dict(_tensors_of(single)).get(key) for single in singles]
        held = [each for each in own if each is not None and each.dim() == tensor.dim() > 0]
        several = len({len(each) for each in held}) > 1
        if several and sum(each.numel() for each in held) == tensor.numel():
            names.append(key)
    return frozenset(names)


def possible_denominators(
    batch: Any, *, unpadded: frozenset[str] = frozenset()
) -> dict[str, Denominator]:
    """Everything that a loop could divide a batch by, and the cause that it is if it does.

    Args:
        batch: A mapping, a sequence or a tensor.
        unpadded: Names of tensors without padding, from `unpadded_of`.

    Returns:
        By what is counted.
    """
    counts: dict[str, Denominator] = {}

    def count(name: str, cause: str, number: Any) -> None:
        counts[name] = Denominator(cause, float(number))

    labels = batch["labels"] if _has_key(batch, "labels") else None
    if isinstance(labels, Tensor) and labels.dim() > 1 and not labels.is_floating_point():
        count("labels", "unshifted-count", (labels != IGNORE).sum())
    for key, tensor in _tensors_of(batch):
        if not tensor.dim():
            continue
        like_labels = isinstance(labels, Tensor) and tensor.shape == labels.shape
        if key in unpadded:
            count(f"rows of {key}", "example-weighted", len(tensor))
        elif tensor.dim() > 1:
            count(f"elements of {key}", "padding-counted", tensor.numel())
            count(f"elements of {key}[:, 1:]", "padding-counted", tensor[:, 1:].numel())
        if not tensor.is_floating_point():
            # Tokens that are real but no targets, such as a prompt's, or any other unit.
            tokens = like_labels and tensor.dim() > 1
            cause = "padding-counted" if tokens else "example-weighted"
            count(f"non-zeros of {key}", cause, (tensor != 0).sum())
            if bool((tensor == IGNORE).any()) and not (key == "labels" and "labels" in counts):
                count(f"labels of {key}", "example-weighted", (tensor != IGNORE).sum())
            binary = bool(((tensor == 0) | (tensor == 1)).all())
            count(f"sum of {key}", cause if binary else "example-weighted", tensor.sum())
        else:
            count(f"sum of {key}", "example-weighted", tensor.sum())
    return counts
