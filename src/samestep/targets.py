"""Which positions of a batch are targets: decided once, for counting and for the loss.

The denominators (counted from the data before any forward) and the losses (summed
over the same positions) must agree to the last token, so both call this module.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from samestep.errors import ConfigError

IGNORE = -100
"""The label of a position that is not a target (the convention of PyTorch and transformers)."""


def shifted_targets(micro: Mapping[str, Any]) -> Tensor:
    """The next token to predict at every position, or ``IGNORE``.

    Position i predicts token i + 1 of the same sequence. A label is therefore no
    target when it is ``IGNORE``, the first token of a sequence, the first token of a
    pack, or predicted from padding.

    Args:
        micro: A micro-batch with ``labels`` [rows, length] (label i is token i itself,
            not shifted); optionally ``position_ids`` [rows, length], in which a 0 starts
            a new sequence (so that packs are cut), and ``attention_mask`` [rows, length],
            in which a 0 is padding.

    Returns:
        Targets [rows, length], int64.
    """
    labels: Tensor = micro["labels"]
    following = labels[:, 1:]
    is_target = following != IGNORE
    if micro.get("position_ids") is not None:
        is_target = is_target & (micro["position_ids"][:, 1:] != 0)
    if micro.get("attention_mask") is not None:
        mask = micro["attention_mask"].bool()
        is_target = is_target & mask[:, :-1] & mask[:, 1:]
    targets = torch.full_like(labels, IGNORE)
    targets[:, :-1] = torch.where(is_target, following, IGNORE)
    return targets


def shifted_weights(micro: Mapping[str, Any]) -> Tensor:
    """How much the next token counts as a target at every position.

    Args:
        micro: As for `shifted_targets`; optionally ``token_weights`` [rows, length], in which
            number i is that of token i as a target.

    Returns:
        [rows, length], float64; 0 where there is no target.
    """
    is_target = (shifted_targets(micro) != IGNORE).double()
    weights = micro.get("token_weights")
    if weights is None:
        return is_target
    if weights.shape != is_target.shape:
        raise ConfigError(
            f"token_weights has shape {tuple(weights.shape)}, but labels {tuple(is_target.shape)}"
        )
    is_target[:, :-1] *= weights[:, 1:]
    return is_target


def sequence_ids(micro: Mapping[str, Any]) -> Tensor:
    """The number of the sequence that each position belongs to, counted over the micro-batch.

    Args:
        micro: As for `shifted_targets`. Without ``position_ids`` each row is one sequence.
            With them, a row is a pack where a 0 starts a sequence; rows that also have an
            ``attention_mask`` are padded, one sequence each.

    Returns:
        Sequence numbers [rows, length], int64, from 0, in reading order.
    """
    labels: Tensor = micro["labels"]
    rows = torch.arange(labels.shape[0], device=labels.device)[:, None].expand_as(labels)
    if micro.get("position_ids") is None or micro.get("attention_mask") is not None:
        return rows
    starts = micro["position_ids"] == 0
    # A row always starts a sequence, even one that continues elsewhere at position > 0.
    starts = starts.clone()
    starts[:, 0] = True
    ids: Tensor = starts.flatten().cumsum(0) - 1
    return ids.view_as(labels)


def spans(micro: Mapping[str, Any]) -> list[tuple[int, slice]]:
    """Where each sequence stands: its row, and its positions there.

    Args:
        micro: A micro-batch of `samestep.data.collate.collate`; with ``input_ids`` alone each row
            is one sequence.

    Returns:
        A place for each sequence, in reading order.
    """
    if "cu_seq_lens_q" in micro:
        borders = micro["cu_seq_lens_q"].tolist()
        return [(0, slice(a, b)) for a, b in itertools.pairwise(borders)]
    mask = micro.get("attention_mask")
    if mask is None:
        rows, length = micro["input_ids"].shape
        return [(row, slice(0, length)) for row in range(rows)]
    starts, lengths = mask.argmax(dim=1).tolist(), mask.sum(dim=1).tolist()
    return [(i, slice(a, a + n)) for i, (a, n) in enumerate(zip(starts, lengths, strict=True))]
