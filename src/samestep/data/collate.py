"""Examples and records to a micro-batch: concatenated without padding, or padded for comparison."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from samestep.data.examples import Example
from samestep.data.records import Record
from samestep.engine.device_copy import DeviceCopy, data_of
from samestep.engine.targets import IGNORE, sequence_spans, target_positions

Padding: TypeAlias = Literal["none", "right", "left"]
"""The layout of a micro-batch: one row of all sequences, or a row each, filled up on one side."""

_MODEL_INPUTS = ("token_type_ids",)
"""Token fields that are inputs of the model."""


def collate_examples(
    examples: Sequence[Example], *, padding: Padding = "none", pad_id: int = 0
) -> dict[str, Any]:
    """One micro-batch, as a mapping that the model and the loss read.

    Args:
        examples: At least one.
        padding: "none" concatenates into one row: ``position_ids`` restart at each sequence,
            and the borders are given as ``cu_seq_lens_q``/``_k`` [sequences + 1] (int32) and
            ``max_length_q``/``_k``, transformers' names. "right" and "left" give a row each and
            an ``attention_mask``.
        pad_id: What to fill padding with; no mask or label depends on it.

    Returns:
        ``input_ids``, ``labels``, ``position_ids`` [rows, length] int64, what ``padding`` adds,
        ``example_ids`` [sequences] int64 (their rows in the source), and ``example_weights``
        [sequences] float64 if any weight is not 1, and ``token_weights`` [rows, length] float64
        if any example has them. Known without asking a device, for what loses time there:
        ``spans`` (`samestep.engine.targets.sequence_spans`) and ``target_positions``
        (`samestep.engine.targets.target_positions`); ``example_ids`` stays on the CPU too.
    """
    micro = (
        _packed(examples) if padding == "none" else _padded(examples, side=padding, pad_id=pad_id)
    )
    micro["spans"] = sequence_spans(micro)
    micro["example_ids"] = torch.tensor([example.row for example in examples])
    if any(example.weight != 1 for example in examples):
        weights = [example.weight for example in examples]
        micro["example_weights"] = torch.tensor(weights, dtype=torch.float64)
    if any(example.token_weights is not None for example in examples):
        token_weights = [_token_weights(example) for example in examples]
        micro["token_weights"] = scatter_tokens(token_weights, micro, fill=0)
    micro["target_positions"] = target_positions(micro)
    return micro


def _token_weights(example: Example) -> Tensor:
    if example.token_weights is None:
        return torch.ones(len(example.input_ids), dtype=torch.float64)
    return example.token_weights.double()


def _packed(examples: Sequence[Example]) -> dict[str, Any]:
    lengths = torch.tensor([len(example.input_ids) for example in examples])
    borders = torch.zeros(len(examples) + 1, dtype=torch.int32)
    borders[1:] = lengths.cumsum(0)
    longest = int(lengths.max())
    return {
        "input_ids": torch.cat([example.input_ids for example in examples])[None],
        "labels": torch.cat([example.labels for example in examples])[None],
        "position_ids": torch.cat([torch.arange(int(length)) for length in lengths])[None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _padded(
    examples: Sequence[Example], *, side: Literal["right", "left"], pad_id: int
) -> dict[str, Any]:
    ids = [example.input_ids for example in examples]
    positions = [torch.arange(len(sequence)) for sequence in ids]
    return {
        "input_ids": pad_rows(ids, fill=pad_id, side=side),
        "labels": pad_rows([example.labels for example in examples], fill=IGNORE, side=side),
        "position_ids": pad_rows(positions, fill=0, side=side),
        "attention_mask": attention_mask(ids, side=side),
    }


def pad_rows(
    rows: Sequence[Tensor], *, fill: int, side: Literal["right", "left"] = "right"
) -> Tensor:
    """Rows of different lengths as one tensor.

    Args:
        rows: Each [its length, ...].
        fill: What padding holds.
        side: Where padding goes.

    Returns:
        [rows, longest, ...].
    """
    return pad_sequence(list(rows), batch_first=True, padding_value=fill, padding_side=side)


def attention_mask(rows: Sequence[Tensor], *, side: Literal["right", "left"] = "right") -> Tensor:
    """Which positions of `pad_rows` are no padding.

    Args:
        rows: As for `pad_rows`.
        side: As for `pad_rows`.

    Returns:
        [rows, longest], int64: 1, or 0 in padding.
    """
    return pad_rows([torch.ones(len(row)).long() for row in rows], fill=0, side=side)


def collate_records(
    records: Sequence[Record], *, padding: Padding = "none", pad_id: int = 0
) -> dict[str, Any]:
    """One micro-batch of records.

    Args:
        records: At least one.
        padding: As for `collate_examples`.
        pad_id: As for `collate_examples`.

    Returns:
        What `collate_examples` gives for all sequences of the records, in order; and ``fields``,
        if there are any: those of records stacked [records, ...], those of tokens
        [rows, length, ...].
    """
    sequences = [sequence for record in records for sequence in record.sequences]
    micro = collate_examples(sequences, padding=padding, pad_id=pad_id)
    fields = {
        name: torch.stack([record.fields[name] for record in records]) for name in records[0].fields
    }
    for name in records[0].token_fields:
        values = [value for record in records for value in record.token_fields[name]]
        fill = 0 if values[0].is_floating_point() or name in _MODEL_INPUTS else IGNORE
        placed = scatter_tokens(values, micro, fill=fill)
        if name in _MODEL_INPUTS:
            micro[name] = placed
        else:
            fields[name] = placed
    return {**micro, "fields": fields} if fields else micro


def scatter_tokens(
    values: Sequence[Tensor | None], micro: Mapping[str, Any], *, fill: int
) -> Tensor:
    """Values of tokens, put where the tokens stand in a micro-batch.

    Args:
        values: For each sequence of the micro-batch in order [its length, ...]; None for one that
            has none. At least one has some.
        micro: The micro-batch.
        fill: What padding holds, and sequences without values.

    Returns:
        [rows, length, ...], of the values' type.
    """
    first = next(value for value in values if value is not None)
    placed = first.new_full((*micro["input_ids"].shape, *first.shape[1:]), fill)
    for value, (row, span) in zip(values, sequence_spans(micro), strict=True):
        if value is not None:
            placed[row, span] = value
    return placed


def to_device(micro: dict[str, Any], device: torch.device) -> DeviceCopy:
    """Copy a micro-batch to a device.

    Args:
        micro: Its tensors and those of mappings inside it are copied; ``example_ids`` stay, because
            only the CPU reads them.
        device: Where to.

    Returns:
        A new micro-batch, which the step counts without asking the device. Copies may still be
        under way: the device orders them.
    """
    copies = map_tensors(micro, lambda tensor: tensor.to(device, non_blocking=True))
    return DeviceCopy(copies, data_of(micro))


def map_tensors(micro: Mapping[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A micro-batch with every tensor changed but ``example_ids``, which only the CPU reads.

    Args:
        micro: Tensors, mappings of them, and anything else, which stays.
        change: What a tensor becomes.

    Returns:
        A new micro-batch.
    """

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return map_tensors(value, change)
        return change(value) if isinstance(value, Tensor) else value

    return {key: value if key == "example_ids" else changed(value) for key, value in micro.items()}
