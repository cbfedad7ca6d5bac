"""Examples to a micro-batch: concatenated without padding, or padded for comparison."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from samestep.data.examples import Example
from samestep.engine.targets import IGNORE, sequence_spans, target_positions

Padding = Literal["none", "right", "left"]


def collate(
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
    batch = _pack(examples) if padding == "none" else _pad(examples, padding, pad_id)
    batch["spans"] = sequence_spans(batch)
    batch["example_ids"] = torch.tensor([example.row for example in examples])
    if any(example.weight != 1 for example in examples):
        weights = [example.weight for example in examples]
        batch["example_weights"] = torch.tensor(weights, dtype=torch.float64)
    if any(example.token_weights is not None for example in examples):
        batch["token_weights"] = _token_weights(examples, batch)
    batch["target_positions"] = target_positions(batch)
    return batch


def _token_weights(examples: Sequence[Example], batch: dict[str, Any]) -> Tensor:
    laid_out = torch.zeros(batch["labels"].shape, dtype=torch.float64)
    for example, (row, span) in zip(examples, sequence_spans(batch), strict=True):
        given = example.token_weights
        laid_out[row, span] = 1.0 if given is None else given.double()
    return laid_out


def _pack(examples: Sequence[Example]) -> dict[str, Any]:
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


def _pad(
    examples: Sequence[Example], side: Literal["right", "left"], pad_id: int
) -> dict[str, Any]:
    def padded(rows: list[Tensor], fill: int) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=fill, padding_side=side)

    lengths = [len(example.input_ids) for example in examples]
    return {
        "input_ids": padded([example.input_ids for example in examples], pad_id),
        "labels": padded([example.labels for example in examples], IGNORE),
        "position_ids": padded([torch.arange(length) for length in lengths], 0),
        "attention_mask": padded([torch.ones(length).long() for length in lengths], 0),
    }


def to_device(micro: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The micro-batch with its tensors on a device, those inside ``fields`` too.

    ``example_ids`` stay: only the CPU reads them.
    """

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return to_device(value, device)
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

    return {key: value if key == "example_ids" else moved(value) for key, value in micro.items()}
